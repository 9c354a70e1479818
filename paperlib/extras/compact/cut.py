"""Find the channels that no later layer uses, and cut them out."""

from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from paperlib.extras.compact.channels import Axis, Following, foldable, takes, total
from paperlib.pruning.graph import layer_type
from paperlib.pruning.masks import mask_of, remove_mask
from paperlib.pruning.operations import NORMS


@torch.no_grad()
def cut(following: Following) -> None:
    """Cut a network's layers, in place, down to the channels that later layers use."""
    kept = _kept(following)
    for layer in following.readers:  # constants that a layer reads are added to its bias
        gone, bias = ~kept[layer.reads.ids].to(following.device), layer.module.bias
        shift = total(layer.module)[:, gone] @ layer.reads.values[gone].nan_to_num()
        if shift[kept[layer.writes.ids]].any():
            _set(layer.module, "bias", shift if bias is None else bias + shift)
    for axis in following.axes:
        _shorten(axis, kept[axis.ids])
    for axis in following.axes:
        _fit(axis.module)


def _kept(following: Following) -> Tensor:
    """Return whether each channel stays: bool (count,), by its id."""
    count = following.count
    pairs = torch.cat([torch.zeros(2, 0), *following.ties], 1).long().numpy()
    graph = coo_array((np.ones(pairs.shape[1]), tuple(pairs)), shape=(count, count))
    group = torch.from_numpy(connected_components(graph, directed=False)[1]).long()
    readers = []  # the inputs that each output uses, and the groups of both
    for layer in following.readers:
        notices = takes(layer.module) & ~foldable(layer.module, layer.reads.values)
        readers.append((notices.cpu(), group[layer.reads.ids], group[layer.writes.ids]))
    fixed = torch.zeros(count, dtype=torch.bool)
    fixed[group[torch.cat(following.fixed)]] = True
    while True:
        kept, before = torch.ones_like(fixed), None
        while before is None or not kept.equal(before):
            before, kept = kept, fixed.clone()
            for notices, reads, writes in readers:
                kept[reads[notices[before[writes]].any(0)]] = True
        empty = [writes for _, _, writes in readers if not kept[writes].any()]
        if not empty:
            return kept[group]
        fixed[torch.stack([writes[0] for writes in empty])] = True


def _shorten(axis: Axis, kept: Tensor) -> None:
    """Cut a tensor along a dimension, or reduce the number of channels that padding adds."""
    module, name = axis.module, axis.tensor
    tensor: Any = getattr(module, name, None)
    if name == "padding":
        before, after = tensor[-2:]
        added = int(kept[:before].sum()), int(kept[len(kept) - after :].sum())
        module.padding = (*tensor[:-2], *added)
    elif tensor is not None:
        indices = kept.nonzero().squeeze(1).to(tensor.device)
        _set(module, name, tensor.index_select(axis.dim, indices))
        mask = mask_of(module)
        if mask is not None and mask.all():
            remove_mask(module)


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer by one of another shape."""
    if name in module._parameters:
        old = module._parameters[name]
        tensor = nn.Parameter(tensor.detach(), requires_grad=old is None or old.requires_grad)
    setattr(module, name, tensor)


def _fit(module: Any) -> None:
    """Set the sizes that a layer states to those of its tensors."""
    kind = layer_type(module)
    if kind is nn.Conv2d:
        module.out_channels, inputs = module.weight.shape[:2]
        module.groups = 1 if module.groups == 1 else module.out_channels
        module.in_channels = inputs * module.groups
    elif kind is nn.Linear:
        module.out_features, module.in_features = module.weight.shape
    elif kind in NORMS:
        tensor = module.running_mean if module.weight is None else module.weight
        module.num_features = module.num_features if tensor is None else len(tensor)
    elif kind is nn.PReLU:
        module.num_parameters = len(module.weight)
