"""Find constant and unused channels by following a network's graph in evaluation mode.

Forwards from the input: which channels are the same for every image and pixel, and with what value;
which are one and the same; and which layers read and write them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata

from paperlib.models import PadChannels, ResidualSum
from paperlib.pruning import operations as ops
from paperlib.pruning.graph import Traced, argument
from paperlib.pruning.masks import BUFFER
from paperlib.pruning.shapes import layouts

# Operations on single values, the same for all channels: their constants are computed.
_ELEMENTWISE = ops.ELEMENTWISE | ops.ACTIVATIONS | ops.PASSING
_AFFINE = {nn.Conv2d: 4, nn.Linear: 2}  # and the dimensions of the input they are understood for
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_PER_CHANNEL = (ops.SPATIAL - ops.ACROSS) | (ops.MOVES - {PadChannels})


class CompactError(ValueError):
    """A network that cannot be made compact or measured; the message names the module."""


@dataclass
class Channels:
    """A tensor's features along dimension 1.

    Attributes:
        ids: (features,), the channel that each one is of; several are of one after a flattening.
        values: (features,), what each one is for every image and pixel; nan where it varies.
    """

    ids: Tensor
    values: Tensor


@dataclass
class Layer:
    """A module that has to be resized, with the channels that it reads and writes.

    Attributes:
        module: the module.
        reads: the channels of its input.
        writes: those of its output.
        mixes: each output is made of all inputs.
        masks: its mask is resized, and nothing else of it.
    """

    module: Any
    reads: Channels
    writes: Channels
    mixes: bool = False
    masks: bool = False


class _Values(ShapeProp):
    """Runs a graph, and notes the shape of each tensor and the value of all else."""

    def run_node(self, node: fx.Node) -> object:
        result = super().run_node(node)
        if not isinstance(result, Tensor):
            node.meta["value"] = result
        return result


class Following:
    """Follows a network's channels from its input on.

    Attributes:
        count: how many channels there are; their ids are 0 to count - 1.
        fixed: ids of channels that have to stay.
        ties: (2, n) ids of channels that stay or go together.
        layers: the layers to resize, by name.

    Raises CompactError where the graph is not understood and pruned channels reach that place.
    """

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self.device, self.dtype = inputs.device, inputs.dtype
        try:
            self.traced = Traced(model, False)
            _Values(fx.GraphModule(model, self.traced.graph)).propagate(inputs)
        except Exception as error:
            raise CompactError(
                f"cannot follow the forward pass of {type(model).__name__} with torch.fx: {error}"
            ) from error
        self.layouts = layouts(self.traced)
        self.count = 0
        self.fixed: list[Tensor] = []
        self.ties: list[Tensor] = []
        self.layers: dict[str, Layer] = {}
        self.channels: dict[fx.Node, Any] = {}
        for node in self.traced.graph.nodes:
            self.channels[node] = self._follow(node)

    def _follow(self, node: fx.Node) -> Channels | None:
        if node.op == "output":
            self.fixed += [c.ids for c in self._sources(node) if c is not None]
            return None
        if node.op == "placeholder":
            return self._fix(node)
        if node.op == "get_attr":
            return self._mask(node) if self.traced.name(node).rpartition(".")[2] == BUFFER else None
        if node in self.traced.shapes and not isinstance(
            node.meta.get("tensor_meta"), TensorMetadata
        ):
            return None
        channels = self._understood(node)
        if channels is None:
            return self._unknown(node)
        module = self.traced.module(node)
        if module is not None and getattr(module, BUFFER, None) is not None:
            # Its hook is not in the graph.
            values = torch.where(module.get_buffer(BUFFER).flatten() == 0, 0, channels.values)
            channels = replace(channels, values=values)
            self._add(f"{node.target}.{BUFFER}", Layer(module, channels, channels, masks=True))
        return channels

    def _understood(self, node: fx.Node) -> Channels | None:
        """Return the channels of a node's output, None where its operation is not known."""
        sources, key = self._sources(node), self.traced.key(node)
        if not sources or None in sources or not _shape(node):
            return None
        for keys, rule in (
            (_AFFINE, self._convolved),
            (_NORMS, self._normed),
            ({ResidualSum}, self._summed),
            ({PadChannels}, self._padded),
            (_ELEMENTWISE, self._elementwise),
            (ops.CAT, self._concatenated),
            (_PER_CHANNEL, self._moved),
        ):
            if key in keys:
                return rule(node, sources)
        return None

    def _unknown(self, node: fx.Node) -> Channels | None:
        """Of an operation that is not understood nothing may be cut, neither before nor after."""
        for source in self._sources(node):
            if source is not None and not source.values.isnan().all():
                raise CompactError(
                    f"pruned channels are read by {self.traced.describe(node)}, and how that "
                    "treats channels is not known"
                )
            if source is not None:
                self.fixed.append(source.ids)
        return self._fix(node)

    # Rules: from the channels of a node's inputs to those of its output

    def _moved(self, node: fx.Node, sources: Sequence[Channels]) -> Channels | None:
        before, out = _shape(node.all_input_nodes[0]), _shape(node)
        if len(sources) > 1 or node not in self.layouts:
            return None
        if out[:2] == before[:2]:
            return replace(sources[0], values=self._evaluate(node))
        size = node.args[-1][-1] if isinstance(node.args[-1], tuple | list) else node.args[-1]
        states_size = self.traced.key(node) in ops.VIEW and size != -1
        if states_size or out != (before[0], math.prod(before[1:])):
            return None
        pixels = math.prod(before[2:])
        ids, values = sources[0].ids, sources[0].values
        return Channels(ids.repeat_interleave(pixels), values.repeat_interleave(pixels))

    def _concatenated(self, node: fx.Node, sources: Sequence[Channels]) -> Channels | None:
        if argument(node, 1, "dim", 0) != 1:
            return None
        return _joined([self.channels[source] for source in argument(node, 0, "tensors")])

    def _convolved(self, node: fx.Node, sources: Sequence[Channels]) -> Channels | None:
        [source] = sources
        module = self.traced.module(node)
        if len(_shape(node.all_input_nodes[0])) != _AFFINE[self.traced.key(node)]:
            return None
        groups = getattr(module, "groups", 1)
        if groups > 1 and not groups == module.in_channels == module.out_channels:
            # What it reads and writes stays as it is, zero or not.
            self.fixed.append(source.ids)
            return self._fix(node)
        ignores = foldable(module, source.values)
        if groups > 1:
            varies = (takes(module) & ~ignores[:, None]).any(1)
            values = total(module).flatten() * source.values.nan_to_num()
        else:
            varies = (takes(module) & ~ignores).any(1)
            values = total(module) @ source.values.nan_to_num()
        if module.bias is not None:
            values = values + module.bias.detach()
        values = torch.where(varies, torch.nan, values)
        writes = Channels(source.ids, values) if groups > 1 else self._new(values)
        return self._add(self.traced.name(node), Layer(module, source, writes, mixes=groups == 1))

    def _normed(self, node: fx.Node, sources: Sequence[Channels]) -> Channels:
        [source] = sources
        norm, values = self.traced.module(node), self._evaluate(node)
        if norm.weight is not None:
            shift = 0 if norm.bias is None else norm.bias
            values = torch.where(norm.weight == 0, shift, values)
        return self._add(
            self.traced.name(node), Layer(norm, source, replace(source, values=values))
        )

    def _summed(self, node: fx.Node, sources: Sequence[Channels]) -> Channels | None:
        if len(sources) != 2:
            return None
        module, values = self.traced.module(node), sources[1].values
        if module.keep is not None:
            values = torch.where(module.keep.flatten() == 0, 0, values)
        tied = self._tied(sources, sources[0].values + values)
        return self._add(self.traced.name(node), Layer(module, sources[0], tied, masks=True))

    def _padded(self, node: fx.Node, sources: Sequence[Channels]) -> Channels:
        [source] = sources
        module = self.traced.module(node)
        before, after = (self._new(torch.zeros(n)) for n in module.padding[-2:])
        padded = _joined([before, source, after])
        return self._add(self.traced.name(node), Layer(module, source, padded))

    def _elementwise(self, node: fx.Node, sources: Sequence[Channels]) -> Channels | None:
        out, shapes = _shape(node), [_shape(source) for source in self.traced.tensors(node)]
        if {(len(shape), shape[1]) for shape in shapes} != {(len(out), out[1])}:
            return None
        values, module = self._evaluate(node), self.traced.module(node)
        if self.traced.key(node) in ops.MULTIPLY:
            zero = torch.stack([source.values == 0 for source in sources]).any(0)
            values = torch.where(zero, 0, values)
        channels = self._tied(sources, values)
        if isinstance(module, nn.PReLU) and module.num_parameters > 1:
            self._add(self.traced.name(node), Layer(module, channels, channels))
        return channels

    def _mask(self, node: fx.Node) -> Channels:
        owner = self.traced.modules[self.traced.name(node).rpartition(".")[0]]
        keep = self._new(getattr(owner, BUFFER).flatten())
        return self._add(self.traced.name(node), Layer(owner, keep, keep, masks=True))

    # What the rules are made of

    def _sources(self, node: fx.Node) -> list[Any]:
        return [self.channels[source] for source in self.traced.tensors(node)]

    @torch.no_grad()
    def _evaluate(self, node: fx.Node) -> Tensor:
        """Return the values of constant channels after an operation on each channel alone."""

        def constant(source: fx.Node) -> object:
            if source in self.traced.shapes:
                return source.meta["value"]
            values, shape = self.channels[source].values, _shape(source)
            return values.view(1, -1, *[1] * len(shape[2:])).repeat(1, 1, *shape[2:])

        out = self.traced.evaluate(node, constant)
        low, high = out.reshape(out.shape[1], -1).aminmax(dim=1)
        uniform = torch.isclose(low, high, rtol=1e-5, atol=0) & high.isfinite()
        return torch.where(uniform, high, torch.nan)

    def _new(self, values: Tensor) -> Channels:
        ids = torch.arange(self.count, self.count + len(values), device=self.device)
        self.count += len(values)
        return Channels(ids, values.to(self.device, self.dtype))

    def _fix(self, node: fx.Node) -> Channels | None:
        shape = _shape(node)
        if len(shape) < 2:
            return None
        channels = self._new(torch.full(shape[1:2], torch.nan))
        self.fixed.append(channels.ids)
        return channels

    def _tied(self, sources: Sequence[Channels], values: Tensor) -> Channels:
        self.ties += [torch.stack([sources[0].ids, source.ids]) for source in sources[1:]]
        return Channels(sources[0].ids, values)

    def _add(self, name: str, layer: Layer) -> Channels:
        if name in self.layers:
            raise CompactError(f"{name!r} is used more than once in the forward pass")
        self.layers[name] = layer
        return layer.writes


def takes(module: Any) -> Tensor:
    """Return, (outputs, inputs) bool, whether an output takes anything of an input."""
    return module.weight[..., None].flatten(2).any(2)


def total(module: Any) -> Tensor:
    """Return, (outputs, inputs), what outputs take of inputs that are the same at every pixel."""
    return module.weight.detach()[..., None].flatten(2).sum(2)


def foldable(module: nn.Module, values: Tensor) -> Tensor:
    """Return, (inputs,) bool, whether all that a layer takes of an input is one constant."""
    padded = isinstance(module, nn.Conv2d) and module.padding_mode == "zeros"
    if padded and module.padding not in ((0, 0), "valid"):
        return values == 0
    return ~values.isnan()


def _shape(node: fx.Node) -> tuple[int, ...]:
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape) if isinstance(meta, TensorMetadata) else ()


def _joined(parts: Sequence[Channels]) -> Channels:
    return Channels(torch.cat([p.ids for p in parts]), torch.cat([p.values for p in parts]))
