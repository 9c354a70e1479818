"""A physically smaller network from a pruned one, what each of them costs, and how to keep it.

PyTorch's pruned networks are as large as dense ones: a pruned filter is a block of zeros. Here they
are cut out, along with every channel and neuron that nothing after it would miss. Two facts decide,
found by following the network's graph in evaluation mode: which channels are constant, forwards
from the input, and which are noticed by a layer that reads them, backwards from the output.

>>> from paperlib import models
>>> from paperlib.compact import compact
>>> from paperlib.pruning import FilterPruner
>>> network = models.build("vgg11_bn", width=0.25)
>>> pruner = FilterPruner(network, fractions=[0.5, 0.5])
>>> removed = pruner.prune(event=1, events=1)
>>> compact(network, pruner).features[25]
Conv2d(64, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
"""

import gzip
import json
import math
import operator
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata
from torch.utils.flop_counter import FlopCounterMode

from paperlib import backends, models, pruning
from paperlib.models import PadChannels, ResidualSum
from paperlib.pruning import FilterPruner, WeightPruner

TOLERANCE = 1000  # of the output's floating-point resolution, relative to its largest value
MASK = "output_mask"


class CompactError(ValueError):
    """A network or file that cannot be made compact or read; the message names module or tensor."""


def compact(
    model: nn.Module,
    *pruners: FilterPruner | WeightPruner,
    example: Sequence[int] | Tensor = (2, 3, 32, 32),
) -> nn.Module:
    """A copy of a pruned network without what pruning has made superfluous.

    In evaluation mode, for images of the example's size, its outputs are the same but for rounding;
    it can be trained on. A channel or neuron is cut if no layer that reads it would notice: it is
    zero, or has no weights going out, or is a constant that can be folded into the reader's bias.
    The channels of a residual stage are cut together or not at all. What cannot be cut exactly
    stays, masked: so does a constant other than zero that a padded convolution reads, as with
    `FilterPruner(norm=False)`. Every layer keeps at least one channel. Forward hooks are not
    carried over.

    pruners: those of `model`; with none, what is zero in it is all that counts. example: an input,
    or the shape of one, on which both networks are run and compared.

    Raises CompactError, naming the module, where the network's graph is not understood, and where
    a parameter is not zero that a pruner holds at zero.
    """
    for name, module in model.named_modules():
        if type(module) in _WEIGHTED and not {"weight", "bias"} <= set(module._parameters):
            raise CompactError(
                f"weight or bias of {name!r} is not a parameter of it: make its pruning or "
                "parametrization permanent first (torch.nn.utils.prune.remove)"
            )
    _check_held(model, pruners)
    small = deepcopy(model).eval()
    inputs = _example(small, example)
    expected = _outputs(small, inputs, type(model).__name__)
    for module in small.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    _carry_masks(model, small, pruners)
    _Cut(small, inputs).apply()
    _check_same(expected, _outputs(small, inputs, f"the compact {type(model).__name__}"))
    for module, original in zip(small.modules(), model.modules(), strict=True):
        module.training = original.training
    return small


def _check_held(model: nn.Module, pruners: Sequence[FilterPruner | WeightPruner]) -> None:
    parameters = dict(model.named_parameters())
    for pruner in pruners:
        for name, gone in pruner.held().items():
            parameter = parameters.get(name)
            if parameter is None or parameter.shape != gone.shape:
                raise CompactError(f"the pruner is of another network: it holds {name!r} at zero")
            if parameter[gone].any():
                raise CompactError(
                    f"{name!r} is not zero where its pruner holds it: call hold() first, and with "
                    "the network of this pruner"
                )


def _example(model: nn.Module, example: Sequence[int] | Tensor) -> Tensor:
    parameter = next(model.parameters(), torch.empty(0))
    if not isinstance(example, Tensor):
        example = torch.randn(tuple(example), generator=torch.Generator().manual_seed(0))
    return example.to(parameter.device, parameter.dtype)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Tensor, what: str) -> object:
    try:
        with backends.full_float32():
            return model(inputs)
    except Exception as error:
        raise CompactError(
            f"{what} does not run on an input of shape {tuple(inputs.shape)}; another can be given "
            f"as example: {error}"
        ) from error


def _check_same(expected: object, actual: object) -> None:
    for a, b in zip(_tensors(expected), _tensors(actual), strict=True):
        if a.is_floating_point():
            error, scale = (a - b).abs().max(), a.abs().max()
            # Written so that outputs that are not finite do not pass.
            if not error <= TOLERANCE * torch.finfo(a.dtype).eps * scale:
                raise CompactError(
                    "the compact network would not be the same network: its outputs differ by "
                    f"{error:.2g} of {scale:.2g}"
                )


def _tensors(output: object) -> Iterator[Tensor]:
    """The tensors in a network's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list | dict):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part)


def _carry_masks(
    model: nn.Module, small: nn.Module, pruners: Sequence[FilterPruner | WeightPruner]
) -> None:
    """Masks at the end of blocks that add with a plain `+`: their pruner applies them by hooks."""
    names = {module: name for name, module in model.named_modules()}
    for pruner in pruners:
        for name, layer in pruner.layers.items() if isinstance(pruner, FilterPruner) else ():
            if pruner.norm and layer.block is not None and not pruner.masks[name].all():
                block = small.get_submodule(names[layer.block])
                keep = pruner.masks[name].to(layer.conv.weight.dtype).view(1, -1, 1, 1)
                _mask_output(block, keep * getattr(block, MASK, 1))


def _mask_output(module: nn.Module, keep: Tensor) -> None:
    """Multiply a module's output by `keep` (1, channels, 1, 1), a buffer of it."""
    if not hasattr(module, MASK):
        module.register_forward_hook(_masked)
    module.register_buffer(MASK, keep)


def _masked(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return output * getattr(module, MASK)


# Following a network's graph


def _functions(names: str) -> set:
    """Functions of torch and operators by these names; and the names: they are of methods."""
    found = {getattr(home, n, None) for home in (torch, F, operator) for n in names.split()}
    return (found | set(names.split())) - {None}


_MULTIPLY = _functions("mul imul mul_ multiply")
_ELEMENTWISE = (
    _MULTIPLY
    | _functions("add iadd add_ sub isub truediv neg abs clamp relu relu_ relu6 leaky_relu elu")
    | _functions("gelu silu mish hardtanh hardswish hardsigmoid sigmoid tanh softplus")
    | _functions("dropout dropout2d contiguous")
    | {nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardtanh}
    | {nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus}
    | {nn.Identity, nn.Dropout, nn.Dropout2d}
)
_SPATIAL = (
    _functions("max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d interpolate")
    | {nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d}
    | {nn.ZeroPad2d, nn.ReflectionPad2d, nn.Upsample}
)
_REDUCE = _functions("mean sum amax")
_FLATTEN = _functions("flatten") | {nn.Flatten}
_VIEW = _functions("view reshape")
_CAT = _functions("cat concat")
_SHAPE = {"size", "dim", getattr}
_AFFINE = {nn.Conv2d: 4, nn.Linear: 2}  # and the dimensions of the input they are understood for
_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d}
_WEIGHTED = {*_AFFINE, *_NORMS}
_SIZED = {*_WEIGHTED, ResidualSum, PadChannels}


from paperlib.pruning.graph import Tracer as _T
class _Tracer(_T):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, PadChannels) or super().is_leaf_module(module, name)


@dataclass
class _Channels:
    """A tensor's features along dimension 1.

    ids: (features,), the channel that each one is of; several are of one after a flattening.
    values: (features,), what each one is for every image and pixel; nan where it varies.
    """

    ids: Tensor
    values: Tensor


@dataclass
class _Layer:
    """A module that has to be resized, with the channels that it reads and writes."""

    module: nn.Module
    reads: _Channels
    writes: _Channels


class _Cut:
    """Finds what can be cut of a network in evaluation mode, and cuts it, in place."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self.model, self.modules = model, dict(model.named_modules())
        self.device, self.dtype = inputs.device, inputs.dtype
        try:
            graph = _Tracer().trace(model)
            ShapeProp(fx.GraphModule(model, graph)).propagate(inputs)
        except Exception as error:
            raise CompactError(
                f"cannot follow the forward pass of {type(model).__name__} with torch.fx: {error}"
            ) from error
        self.count = 0
        self.fixed: list[Tensor] = []  # ids that have to stay
        self.ties: list[Tensor] = []  # (2, n) ids that stay or go together
        self.layers: dict[str, _Layer] = {}
        self.channels: dict[fx.Node, _Channels | None] = {}
        self._check_shared()
        for node in graph.nodes:
            self.channels[node] = self._follow(node)

    # Forwards: what is constant

    def _follow(self, node: fx.Node) -> _Channels | None:
        if node.op == "placeholder":
            return self._fix(node)
        if node.op == "output":
            self.fixed += [c.ids for c in self._sources(node) if c is not None]
            return None
        if node.op == "get_attr":
            return self._mask(node) if node.target.rpartition(".")[2] == MASK else None
        if node.target in _SHAPE and not isinstance(node.meta.get("tensor_meta"), TensorMetadata):
            return None
        return self._understood(node) or self._unknown(node)

    def _understood(self, node: fx.Node) -> _Channels | None:
        """The channels of a node's output, None where the operation is not among the known."""
        sources = self._sources(node)
        module = self.modules[node.target] if node.op == "call_module" else None
        kind = node.target if module is None else type(module)
        out = _shape(node)
        if not sources or sources[0] is None or out is None:
            return None
        first, before = sources[0], _shape(node.all_input_nodes[0])
        flat = kind in _FLATTEN or (kind in _VIEW and _last(node) == -1)
        if flat and out == (before[0], math.prod(before[1:])):
            pixels = math.prod(before[2:])
            return _Channels(*(t.repeat_interleave(pixels) for t in (first.ids, first.values)))
        if None in sources:
            return None
        if kind in _AFFINE and len(before) == _AFFINE[kind] and getattr(module, "groups", 1) == 1:
            return self._affine(node.target, module, first)
        if kind in _NORMS:
            values = self._evaluate(node)
            if module.affine:
                values = torch.where(module.weight == 0, module.bias, values)
            return self._layer(node.target, module, first, replace(first, values=values))
        if kind is ResidualSum and len(sources) == len(node.args) == 2:
            values = sources[1].values
            if module.keep is not None:
                values = torch.where(module.keep.flatten() == 0, 0, values)
            values = first.values + values
            return self._layer(node.target, module, first, self._tied(sources, values))
        if kind is PadChannels:
            pads = [self._new(torch.zeros(n)) for n in module.padding[-2:]]
            padded = _joined([pads[0], first, pads[1]])
            return self._layer(node.target, module, first, padded)
        if kind in _ELEMENTWISE:
            shapes = [_shape(source) for source in node.all_input_nodes]
            if {(len(shape), shape[1]) for shape in shapes} == {(len(out), out[1])}:
                values = self._evaluate(node)
                if kind in _MULTIPLY:
                    zero = torch.stack([source.values == 0 for source in sources]).any(0)
                    values = torch.where(zero, 0, values)
                return self._tied(sources, values)
        if kind in _CAT and (node.args[1:] == (1,) or node.kwargs == {"dim": 1}):
            return _joined([self.channels[source] for source in node.args[0]])
        if len(sources) > 1:
            return None
        if kind in _SPATIAL or _is_spatial(kind, node, len(before)):
            return replace(first, values=self._evaluate(node))
        return None

    def _unknown(self, node: fx.Node) -> _Channels | None:
        """Of an operation that is not understood nothing may be cut, neither before nor after."""
        for source in self._sources(node):
            if source is not None and not source.values.isnan().all():
                raise CompactError(
                    f"pruned channels are read by {self._describe(node)}, and how that treats "
                    "channels is not known"
                )
            if source is not None:
                self.fixed.append(source.ids)
        return self._fix(node)

    def _describe(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{node.target!r} ({type(self.modules[node.target]).__name__})"
        scope = list(node.meta.get("nn_module_stack", {}))
        where = repr(scope[-1]) if scope else type(self.model).__name__
        return f"{getattr(node.target, '__name__', node.target)!r} in {where}"

    def _affine(self, name: str, module: nn.Module, source: _Channels) -> _Channels:
        varies = (_takes(module) & ~_foldable(module, source.values)).any(1)
        values = _total(module) @ source.values.nan_to_num()
        if module.bias is not None:
            values = values + module.bias.detach()
        writes = self._new(torch.where(varies, torch.nan, values))
        return self._layer(name, module, source, writes)

    def _mask(self, node: fx.Node) -> _Channels:
        owner = self.model.get_submodule(node.target.rpartition(".")[0])
        keep = self._new(getattr(owner, MASK).flatten())
        return self._layer(node.target, owner, keep, keep)

    @torch.no_grad()
    def _evaluate(self, node: fx.Node) -> Tensor:
        """What constant channels are after an operation that treats channels alike and apart."""

        def constant(source: fx.Node) -> Tensor:
            values, shape = self.channels[source].values, _shape(source)
            return values.view(1, -1, *[1] * len(shape[2:])).repeat(1, 1, *shape[2:])

        args, kwargs = fx.map_arg((node.args, node.kwargs), constant)
        if node.op == "call_module":
            out = self.modules[node.target](*args, **kwargs)
        elif node.op == "call_method":
            out = getattr(args[0], node.target)(*args[1:], **kwargs)
        else:
            out = node.target(*args, **kwargs)
        low, high = out.reshape(out.shape[1], -1).aminmax(dim=1)
        uniform = torch.isclose(low, high, rtol=1e-5, atol=0) & high.isfinite()
        return torch.where(uniform, high, torch.nan)

    def _sources(self, node: fx.Node) -> list[_Channels | None]:
        return [self.channels[source] for source in node.all_input_nodes]

    def _new(self, values: Tensor) -> _Channels:
        ids = torch.arange(self.count, self.count + len(values), device=self.device)
        self.count += len(values)
        return _Channels(ids, values.to(self.device, self.dtype))

    def _fix(self, node: fx.Node) -> _Channels | None:
        shape = _shape(node)
        if shape is None or len(shape) < 2:
            return None
        channels = self._new(torch.full(shape[1:2], torch.nan))
        self.fixed.append(channels.ids)
        return channels

    def _tied(self, sources: list[_Channels], values: Tensor) -> _Channels:
        self.ties += [torch.stack([sources[0].ids, source.ids]) for source in sources[1:]]
        return _Channels(sources[0].ids, values)

    def _layer(
        self, name: str, module: nn.Module, reads: _Channels, writes: _Channels
    ) -> _Channels:
        if name in self.layers:
            raise CompactError(f"{name!r} is used more than once in the forward pass")
        self.layers[name] = _Layer(module, reads, writes)
        return writes

    def _check_shared(self) -> None:
        seen = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if seen.setdefault(parameter, name) != name:
                raise CompactError(f"{name!r} is the same parameter as {seen[parameter]!r}")

    # Backwards: what is noticed

    def _kept(self) -> Tensor:
        """(count,) bool, by id of channel: whether it stays."""
        pairs = torch.cat([torch.zeros(2, 0), *(t.cpu() for t in self.ties)], 1).long().numpy()
        graph = coo_array((np.ones(pairs.shape[1]), tuple(pairs)), shape=(self.count, self.count))
        group = torch.from_numpy(connected_components(graph, directed=False)[1])
        group = group.to(self.device, torch.long)
        readers = []  # what each of its outputs notices of its inputs, and the groups of both
        for layer in self.layers.values():
            if type(layer.module) in _AFFINE:
                notices = _takes(layer.module) & ~_foldable(layer.module, layer.reads.values)
                readers.append((notices, group[layer.reads.ids], group[layer.writes.ids]))
        fixed = torch.zeros(self.count, dtype=torch.bool, device=self.device)
        fixed[group[torch.cat(self.fixed)]] = True
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

    # The cut

    @torch.no_grad()
    def apply(self) -> None:
        kept = self._kept()
        for layer in self.layers.values():
            module, reads, writes = layer.module, kept[layer.reads.ids], kept[layer.writes.ids]
            if type(module) in _AFFINE:
                shift = _total(module)[:, ~reads] @ layer.reads.values[~reads].nan_to_num()
                shift = shift[writes]
                _index(module, "weight", writes)
                _set(module, "weight", module.weight[:, reads])
                _index(module, "bias", writes)
                if shift.any():
                    _set(module, "bias", shift if module.bias is None else module.bias + shift)
            elif type(module) in _NORMS:
                for name in ("weight", "bias", "running_mean", "running_var"):
                    _index(module, name, writes)
            elif type(module) is PadChannels:
                start = module.padding[-2]
                stop = start + len(reads)
                pads = (int(writes[:start].sum()), int(writes[stop:].sum()))
                module.padding = (*module.padding[:-2], *pads)
            elif type(module) is ResidualSum:
                _index(module, "keep", writes)
                if module.keep is not None and module.keep.all():
                    module.keep = None
            else:
                _set(module, MASK, getattr(module, MASK)[:, writes])
                if getattr(module, MASK).all():
                    delattr(module, MASK)
                    module._forward_hooks.clear()
            _fit(module)


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape) if isinstance(meta, TensorMetadata) else None


def _last(node: fx.Node) -> object:
    """The last size in the arguments of a view."""
    *_, last = node.args
    return last[-1] if isinstance(last, tuple | list) else last


def _is_spatial(kind: object, node: fx.Node, dimensions: int) -> bool:
    """Whether a function acts on dimensions after the second only."""
    if kind in _REDUCE:
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        dims = [dims] if isinstance(dims, int) else dims
        return all(d % dimensions >= 2 for d in dims)
    if kind is operator.getitem:
        index = node.args[1]
        return isinstance(index, tuple) and index[:2] == (slice(None), slice(None))
    if kind is F.pad and len(node.args) > 1:
        return len(node.args[1]) <= 2 * (dimensions - 2)
    return False


def _joined(parts: Sequence[_Channels]) -> _Channels:
    return _Channels(torch.cat([p.ids for p in parts]), torch.cat([p.values for p in parts]))


def _takes(module: nn.Module) -> Tensor:
    """(outputs, inputs) bool: whether an output takes anything of an input."""
    return module.weight[..., None].flatten(2).any(2)


def _total(module: nn.Module) -> Tensor:
    """(outputs, inputs): what an output takes of an input that is the same at every pixel."""
    return module.weight.detach()[..., None].flatten(2).sum(2)


def _foldable(module: nn.Module, values: Tensor) -> Tensor:
    """(inputs,) bool: whether what a layer takes of an input is the same at every pixel."""
    padded = isinstance(module, nn.Conv2d) and module.padding_mode == "zeros"
    if padded and module.padding not in ((0, 0), "valid"):
        return values == 0
    return ~values.isnan()


def _index(module: nn.Module, name: str, kept: Tensor) -> None:
    tensor = getattr(module, name)
    if tensor is not None:
        _set(module, name, tensor[kept])


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer by one of another shape."""
    if name in module._parameters:
        old = module._parameters[name]
        tensor = nn.Parameter(tensor.detach(), requires_grad=old is None or old.requires_grad)
    setattr(module, name, tensor)


def _fit(module: nn.Module) -> None:
    """Set the sizes that a layer states of itself to those of its tensors."""
    if type(module) is nn.Conv2d:
        module.out_channels, inputs = module.weight.shape[:2]
        module.in_channels = inputs * module.groups
    elif type(module) is nn.Linear:
        module.out_features, module.in_features = module.weight.shape
    elif type(module) in _NORMS:
        sizes = [len(t) for t in (module.weight, module.running_mean) if t is not None]
        module.num_features = sizes[0] if sizes else module.num_features


# Files


_FORMAT = 1
_ENTRY = 128  # bytes, about, that one more tensor takes in a file's header
_SETTINGS = {PadChannels: "padding", nn.Dropout: "p"}


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a network, compact or not, to a safetensors file that `load` makes it from again.

    In the file's header is a JSON description: the network's name, the shape and type of each
    tensor, and whether it is stored sparsely: as its values other than zero, in order, and a bitmap
    of where they are, most significant bit first. Those are for which that takes less room. Raises
    CompactError where a module has a forward hook, as that of a block which adds with a plain `+`.
    """
    for name, module in model.named_modules():
        if any(hook is not _masked for hook in module._forward_hooks.values()):
            raise CompactError(f"{name!r} has a hook, which a file cannot hold: compact it first")
    Path(path).write_bytes(_encode(model))


def load(path: str | os.PathLike, model: nn.Module | None = None) -> nn.Module:
    """The network of a file that `save` wrote, on the CPU and in evaluation mode.

    model: where it is none of this package's, a freshly built one of its kind, of any width; it is
    filled, resized, and returned. Raises CompactError where description and tensors disagree, and
    where `model` is another network.
    """
    description, stored = _read(path)
    tensors = {
        name: _decoded(name, entry, stored) for name, entry in description["tensors"].items()
    }
    if stored:
        raise CompactError(f"tensors that the description does not have: {', '.join(stored)}")
    if model is None:
        if description["network"] not in models.MODELS:
            raise CompactError(f"{path} is a network of your own: give a fresh one as `model`")
        with torch.device("meta"):
            model = models.build(description["network"])
    missing = set(model.state_dict()) - set(tensors)
    if missing:
        raise CompactError(f"{path} lacks {', '.join(sorted(missing))}")
    for name, tensor in tensors.items():
        _put(model, name, tensor)
    for name, value in description["settings"].items():
        module = _owner(model, name)
        if type(module) not in _SETTINGS:
            raise CompactError(f"{name!r} is a {type(module).__name__}, which has no settings")
        setattr(module, _SETTINGS[type(module)], tuple(value) if isinstance(value, list) else value)
    return model.eval()


def _encode(model: nn.Module, sparse: bool = True) -> bytes:
    """The content of a network's file."""
    stored, entries = {}, {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        there = tensor.flatten() != 0
        size = int(there.sum()) * tensor.itemsize + math.ceil(tensor.numel() / 8) + _ENTRY
        entry = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        if sparse and size < tensor.numel() * tensor.itemsize:
            stored[f"{name}:values"] = tensor.flatten()[there]
            stored[f"{name}:bitmap"] = torch.from_numpy(np.packbits(there.numpy()))
            entry["sparse"] = True
        else:
            stored[name] = tensor.clone()
        entries[name] = entry
    settings = {
        name: getattr(module, _SETTINGS[type(module)])
        for name, module in model.named_modules()
        if type(module) in _SETTINGS
    }
    description = {
        "format": _FORMAT,
        "network": _network(model),
        "settings": settings,
        "tensors": entries,
    }
    return safetensors.torch.save(stored, {"description": json.dumps(description)})


def _network(model: nn.Module) -> str | None:
    """The name of a network of this package; None of another."""

    def layout(network: nn.Module) -> list:
        return [(name, type(module)) for name, module in network.named_modules()]

    with torch.device("meta"):
        named = (name for name in models.MODELS if layout(models.build(name)) == layout(model))
        return next(named, None)


def _read(path: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})["description"])
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if description["format"] != _FORMAT:
            raise ValueError(f"format {description['format']} is not {_FORMAT}")
        if not all(isinstance(description[key], dict) for key in ("settings", "tensors")):
            raise TypeError("no settings or tensors")
    except FileNotFoundError:
        raise
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CompactError(f"{path} is not the file of a network: {error!r}") from error
    return description, stored


def _decoded(name: str, entry: Mapping, stored: dict[str, Tensor]) -> Tensor:
    """One tensor, taken out of `stored`."""
    try:
        shape, dtype = tuple(entry["shape"]), getattr(torch, entry["dtype"])
        if not entry.get("sparse"):
            tensor = stored.pop(name)
        else:
            values, bitmap = stored.pop(f"{name}:values"), stored.pop(f"{name}:bitmap")
            there = np.unpackbits(bitmap.numpy())
            there, rest = there[: math.prod(shape)], there[math.prod(shape) :]
            if len(there) != math.prod(shape) or len(rest) >= 8 or rest.any():
                raise ValueError(f"a bitmap of {len(there) + len(rest)} bits for {shape}")
            if values.shape != (there.sum(),):
                raise ValueError(f"{tuple(values.shape)} values, {there.sum()} places")
            tensor = torch.zeros(len(there), dtype=values.dtype)
            tensor[torch.from_numpy(there).bool()] = values
            tensor = tensor.view(shape)
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            raise ValueError(f"{tuple(tensor.shape)} {tensor.dtype} instead of {shape} {dtype}")
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CompactError(f"description and tensors disagree on {name!r}: {error!r}") from error
    return tensor


def _owner(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise CompactError(f"{type(model).__name__} has no module {name!r}") from error


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a tensor of a network's state, resizing its module where that can be cut."""
    path, _, key = name.rpartition(".")
    module = _owner(model, path)
    if key == MASK:
        _mask_output(module, tensor)
        return
    if key not in {**module._parameters, **module._buffers}:
        raise CompactError(f"{path!r} in {type(model).__name__} has no {key!r}")
    old = getattr(module, key)
    if old is not None:
        free = 2 if type(module) in _SIZED else 0
        if old.dim() != tensor.dim() or old.shape[free:] != tensor.shape[free:]:
            raise CompactError(
                f"{name!r} is {tuple(tensor.shape)} in the file and {tuple(old.shape)} in "
                f"{type(model).__name__}"
            )
    _set(module, key, tensor)
    _fit(module)


def export_onnx(
    model: nn.Module, path: str | os.PathLike, example: Sequence[int] = (2, 3, 32, 32)
) -> None:
    """Write a network in evaluation mode as ONNX, by torch.export; the batch is of any size.

    example: the shape of an input, with at least 2 images. Needs `pip install paperlib[export]`.
    """
    with _evaluating(model):
        torch.onnx.export(
            model,
            (_example(model, example),),
            os.fspath(path),
            dynamo=True,
            external_data=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )


# What a network costs


def cost(model: nn.Module, example: Sequence[int] = (1, 3, 32, 32)) -> dict[str, int]:
    """What a network takes: counts of parameters and multiply-adds, and bytes.

    parameters, nonzero: all, and those other than zero. multiply_adds: of convolutions and dense
    layers for one image, zeros multiplied like the rest. bytes_dense, bytes_sparse: of its file, as
    `save` would write it without and with sparse storage; bytes_gzipped: of the latter, gzipped.
    example: the shape of an input.
    """
    with _evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(_example(model, example))
    saved = _encode(model)
    parameters = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "nonzero": sum(int(p.count_nonzero()) for p in parameters),
        "multiply_adds": counter.get_total_flops() // 2 // example[0],
        "bytes_dense": len(_encode(model, sparse=False)),
        "bytes_sparse": len(saved),
        "bytes_gzipped": len(gzip.compress(saved, mtime=0)),
    }


def latency(
    model: nn.Module, batch: int = 1, repeats: int = 20, image: Sequence[int] = (3, 32, 32)
) -> float:
    """Median milliseconds that a batch takes on the CPU, in evaluation mode."""
    return _latencies([model], batch, repeats, image)[0]


def cost_table(
    networks: Mapping[str, nn.Module],
    batches: Sequence[int] = (1, 128),
    repeats: int = 20,
    image: Sequence[int] = (3, 32, 32),
) -> pd.DataFrame:
    """`cost` and `latency` of several networks, a row each, by name.

    Columns: those of `cost`, and ms_batch_N for each N of `batches`: median milliseconds a batch on
    the CPU, the networks timed in turns, so that a busy machine slows all of them alike.
    """
    table = pd.DataFrame({name: cost(model, (1, *image)) for name, model in networks.items()}).T
    for batch in batches:
        table[f"ms_batch_{batch}"] = _latencies(list(networks.values()), batch, repeats, image)
    return table


@torch.inference_mode()
def _latencies(
    networks: Sequence[nn.Module], batch: int, repeats: int, image: Sequence[int]
) -> list[float]:
    inputs = [_example(network, (batch, *image)) for network in networks]
    if any(x.device.type != "cpu" for x in inputs):
        raise CompactError("latency is measured on the CPU: move the network there first")
    seconds = [[] for _ in networks]
    for network, x, times in [*zip(networks, inputs, seconds, strict=True)] * (repeats + 1):
        with _evaluating(network):
            start = time.perf_counter()
            network(x)
            times.append(time.perf_counter() - start)
    return [1000 * statistics.median(times[1:]) for times in seconds]  # the first one warms up


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
