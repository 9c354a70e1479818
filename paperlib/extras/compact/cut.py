"""Which channels of a network are noticed by nothing after them, and the cut itself."""

from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from paperlib.extras.compact.channels import Following, Layer, foldable, takes, total
from paperlib.models import PadChannels
from paperlib.pruning.graph import layer_type
from paperlib.pruning.masks import mask_name, mask_of, multiply_by_mask, set_mask
from paperlib.pruning.operations import NORMS

TENSORS = ("weight", "bias", "running_mean", "running_var")


@torch.no_grad()
def cut(following: Following) -> None:
    """Cut a network's layers down to the channels that are noticed, in place."""
    kept = _kept(following)
    for layer in following.layers.values():
        reads, writes = kept[layer.reads.ids], kept[layer.writes.ids]
        if layer.mixes:
            _cut_mixing(layer, reads, writes)
        elif isinstance(layer.module, PadChannels):
            start = layer.module.padding[-2]
            stop = start + len(reads)
            pads = (int(writes[:start].sum()), int(writes[stop:].sum()))
            layer.module.padding = (*layer.module.padding[:-2], *pads)
        elif layer.masks:
            _cut_mask(layer.module, writes)
        else:
            for name in TENSORS:
                _index(layer.module, name, writes)
        _fit(layer.module, len(writes.nonzero()))


def _kept(following: Following) -> Tensor:
    """Return, by id of channel, whether it stays: bool (count,)."""
    count, device = following.count, following.device
    pairs = torch.cat([torch.zeros(2, 0), *(t.cpu() for t in following.ties)], 1).long().numpy()
    graph = coo_array((np.ones(pairs.shape[1]), tuple(pairs)), shape=(count, count))
    group = torch.from_numpy(connected_components(graph, directed=False)[1])
    group = group.to(device, torch.long)
    readers = []  # which inputs each of its outputs notices, and the groups of both
    for layer in following.layers.values():
        if layer.mixes:
            notices = takes(layer.module) & ~foldable(layer.module, layer.reads.values)
            readers.append((notices, group[layer.reads.ids], group[layer.writes.ids]))
    fixed = torch.zeros(count, dtype=torch.bool, device=device)
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


def _cut_mixing(layer: Layer, reads: Tensor, writes: Tensor) -> None:
    """Cut a layer's inputs and outputs, and fold the constants it read into its bias."""
    module = layer.module
    shift = total(module)[:, ~reads] @ layer.reads.values[~reads].nan_to_num()
    shift = shift[writes]
    _index(module, "weight", writes)
    _set(module, "weight", module.weight[:, reads])
    _index(module, "bias", writes)
    if shift.any():
        _set(module, "bias", shift if module.bias is None else module.bias + shift)


def _cut_mask(module: nn.Module, writes: Tensor) -> None:
    """Cut the mask of a residual sum, and remove it where all of the channels left are kept."""
    mask = mask_of(module)
    if mask is None:
        return
    setattr(module, mask_name(module), None)
    for key in [k for k, hook in module._forward_hooks.items() if hook is multiply_by_mask]:
        del module._forward_hooks[key]
    if not mask[writes].all():
        set_mask(module, mask[writes])


def _index(module: nn.Module, name: str, kept: Tensor) -> None:
    tensor = getattr(module, name, None)
    if tensor is not None:
        _set(module, name, tensor[kept])


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer by one of another shape."""
    if name in module._parameters:
        old = module._parameters[name]
        tensor = nn.Parameter(tensor.detach(), requires_grad=old is None or old.requires_grad)
    setattr(module, name, tensor)


def _fit(module: Any, channels: int) -> None:
    """Set the sizes that a layer states of itself to those of its tensors."""
    kind = layer_type(module)
    if kind is nn.Conv2d:
        module.groups = 1 if module.groups == 1 else channels
        module.out_channels = channels
        module.in_channels = module.weight.shape[1] * module.groups
    elif kind is nn.Linear:
        module.out_features, module.in_features = module.weight.shape
    elif kind in NORMS:
        module.num_features = channels
    elif kind is nn.PReLU:
        module.num_parameters = channels
