"""Follow a network's channels through its graph, from the input on, in evaluation mode.

This finds the channels that are the same for every image and pixel, and their values; the channels
that stay or are cut together; and the layers that read and write channels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from paperlib.models import PadChannels, ResidualSum
from paperlib.pruning import operations as ops
from paperlib.pruning.features import Network
from paperlib.pruning.graph import Traced, argument
from paperlib.pruning.masks import BUFFER

_AFFINE = {nn.Conv2d: 4, nn.Linear: 2}  # and the dimensions that their input must have
_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d}
_ALONE = ops.ELEMENTWISE | ops.ACTIVATIONS | ops.PASSING | _NORMS | {ResidualSum}
_FOLLOWED = _ALONE | (ops.SPATIAL - ops.ACROSS) | ops.MOVES | ops.REDUCE
_TENSORS = ("weight", "bias", "running_mean", "running_var")


class CompactError(ValueError):
    """A network that cannot be made compact or measured; the message names the module."""


@dataclass
class Channels:
    """A tensor's features along dimension 1.

    Attributes:
        ids: (features,), the channel of each feature; a flattened channel has several features.
        values: (features,), the value of each for every image and pixel; nan where it varies.
    """

    ids: Tensor
    values: Tensor


@dataclass
class Axis:
    """A dimension of a module's parameter or buffer, or the padding of `PadChannels`.

    Attributes:
        module: The module.
        tensor: The tensor's name in the module; "padding" for the number of added channels.
        dim: The dimension of the tensor.
        ids: The channels along the dimension.
    """

    module: Any
    tensor: str
    dim: int
    ids: Tensor


@dataclass
class Reader:
    """A layer whose every output depends on all inputs, with the channels of both."""

    module: Any
    reads: Channels
    writes: Channels


class Following:
    """Follow a network's channels from its input on.

    Attributes:
        count: How many channels there are; their ids are 0 to count - 1.
        fixed: Ids of channels that must stay.
        ties: (2, n) ids of channels that stay or are cut together.
        readers: The layers that mix channels.
        axes: Everything that has to be resized.

    Raises:
        CompactError: torch.fx cannot follow the network, or only one of training and evaluation
            mode runs some layer, or pruned channels reach an operation that is not understood, or a
            module that has to be resized is used more than once.
    """

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self.device, self.dtype = inputs.device, inputs.dtype
        try:
            self.network = Network(model, False, tuple(inputs.shape[1:]))
            training = Traced(model, True)
        except Exception as error:
            raise CompactError(
                f"cannot follow the forward pass of {type(model).__name__} with torch.fx: {error}"
            ) from error
        if differ := _layers(self.network) ^ _layers(training):
            raise CompactError(
                f"the copy could not be trained, because only one of training and evaluation mode "
                f"runs {', '.join(map(repr, sorted(differ)))}"
            )
        self.count = 0
        self.fixed: list[Tensor] = []
        self.ties: list[Tensor] = []
        self.readers: list[Reader] = []
        self.axes: list[Axis] = []
        self.channels: dict[fx.Node, Channels | None] = {}
        self._resized: set[str] = set()
        with torch.no_grad():
            for node in self.network.graph.nodes:
                self.channels[node] = self._follow(node)

    def _follow(self, node: fx.Node) -> Channels | None:
        if node.op == "placeholder":
            return self._fix(node)
        if node.op == "get_attr":
            owner, _, tensor = self.network.name(node).rpartition(".")
            return self._masked(owner) if tensor == BUFFER else None
        if node in self.network.plain:
            return None
        channels = self._understood(node)
        if channels is None:
            return self._unknown(node)
        if getattr(self.network.module(node), BUFFER, None) is not None:
            # The module's hook is not in the graph.
            mask = self._masked(self.network.name(node))
            self._tie(channels.ids, mask.ids)
            channels.values = torch.where(mask.values == 0, 0, channels.values)
        return channels

    def _unknown(self, node: fx.Node) -> Channels | None:
        """Fix the channels before and after an operation that is not understood."""
        for source in self.network.tensors(node):
            channels = self.channels[source]
            if channels is None:
                continue
            if node.op != "output" and not channels.values.isnan().all():
                raise CompactError(
                    f"pruned channels are read by {self.network.describe(node)}, and how that "
                    "treats channels is not known"
                )
            self.fixed.append(channels.ids)
        return self._fix(node)

    def _understood(self, node: fx.Node) -> Channels | None:
        """Return the channels of a node's output, None if its operation is not known."""
        key = self.network.key(node)
        sources = {s: c for s in self.network.tensors(node) if (c := self.channels[s]) is not None}
        if not sources or len(sources) < len(self.network.tensors(node)):
            return None
        if key in _AFFINE:
            return self._mixed(node, next(iter(sources.values())))
        return self._carried(node, sources) if key in _FOLLOWED else None

    # Rules: from the channels of a node's inputs to those of its output

    def _mixed(self, node: fx.Node, source: Channels) -> Channels | None:
        module, key = self.network.module(node), self.network.key(node)
        if len(self.network.shape(self.network.tensors(node)[0])) != _AFFINE[key]:
            return None
        groups = getattr(module, "groups", 1)
        if groups > 1 and not groups == module.in_channels == module.out_channels:
            # The channels of its input and output stay as they are, zero or not.
            self.fixed.append(source.ids)
            return self._fix(node)
        ignores, known = foldable(module, source.values), source.values.nan_to_num()
        if groups > 1:
            varies = takes(module).flatten() & ~ignores
            values = total(module).flatten() * known
        else:
            varies = (takes(module) & ~ignores).any(1)
            values = total(module) @ known
        if module.bias is not None:
            values = values + module.bias
        values = torch.where(varies, torch.nan, values)
        if groups > 1:
            return self._resize(node, Channels(source.ids, values))
        writes = self._resize(node, self._new(values))
        self.axes.append(Axis(module, "weight", 1, source.ids))
        self.readers.append(Reader(module, source, writes))
        return writes

    def _carried(self, node: fx.Node, sources: dict[fx.Node, Channels]) -> Channels | None:
        """Follow channels through an operation on values or pixels, or one that moves channels."""
        key, module = self.network.key(node), self.network.module(node)
        ids = torch.full(self.network.shape(node)[1:2], -1)
        for source, channels in sources.items():
            origin = self._origin(node, source)
            if origin is None:
                return None
            moved = torch.where(origin < 0, -1, channels.ids[origin])
            both = (ids >= 0) & (moved >= 0)
            self._tie(ids[both], moved[both])
            ids = torch.where(ids < 0, moved, ids)
        if key is not PadChannels and (ids < 0).any():
            return None
        ids[ids < 0] = self._new(torch.zeros(int((ids < 0).sum()))).ids
        known = {source: channels.values for source, channels in sources.items()}
        values = self.network.constants(node, known)
        # Zero times anything is zero.
        if key in _NORMS and module.weight is not None:
            shift = 0 if module.bias is None else module.bias
            values = torch.where(module.weight == 0, shift, values)
        if key is ResidualSum and module.keep is not None:
            branch = known[argument(node, 0, "branch")]
            values = torch.where(module.keep.flatten() == 0, branch, values)
        channels = Channels(ids, values)
        slopes = key is nn.PReLU and module.num_parameters > 1
        if slopes or key in _NORMS | {ResidualSum, PadChannels}:
            return self._resize(node, channels)
        return channels

    def _origin(self, node: fx.Node, source: fx.Node) -> Tensor | None:
        if source.op == "get_attr":  # a mask
            return torch.arange(self.network.shape(node)[1])
        return self.network.origin(node, source)

    # Helpers of the rules

    def _new(self, values: Tensor) -> Channels:
        ids = torch.arange(self.count, self.count + len(values))
        self.count += len(values)
        return Channels(ids, values.to(self.device, self.dtype))

    def _fix(self, node: fx.Node) -> Channels | None:
        features = self.network.shape(node)[1:2]
        if not features:
            return None
        channels = self._new(torch.full(features, torch.nan))
        self.fixed.append(channels.ids)
        return channels

    def _tie(self, ids: Tensor, others: Tensor) -> None:
        self.ties.append(torch.stack([ids, others]))

    def _masked(self, name: str) -> Channels:
        """Return the channels of a module's mask, and note that the mask must be resized."""
        module = self.network.modules[name]
        mask = self._new(module.get_buffer(BUFFER).flatten())
        self._once(f"{name}.{BUFFER}")
        self.axes.append(Axis(module, BUFFER, 1, mask.ids))
        return mask

    def _resize(self, node: fx.Node, channels: Channels) -> Channels:
        """Note that a module's tensors must be resized along their first dimension."""
        module = self.network.module(node)
        self._once(self.network.name(node))
        names = ("padding",) if isinstance(module, PadChannels) else (*_TENSORS, "keep")
        self.axes += [Axis(module, name, 0, channels.ids) for name in names]
        return channels

    def _once(self, name: str) -> None:
        if name in self._resized:
            raise CompactError(f"{name!r} is used more than once in the forward pass")
        self._resized.add(name)


def _layers(traced: Traced) -> set[str]:
    """Return the names of the layers with parameters or buffers that a forward pass calls."""
    called = (node for node in traced.graph.nodes if traced.module(node) is not None)
    return {traced.name(node) for node in called if traced.module(node).state_dict()}


def takes(module: Any) -> Tensor:
    """Return whether each output uses each input: bool (outputs, inputs)."""
    return module.weight[..., None].flatten(2).any(2)


def total(module: Any) -> Tensor:
    """Return the factors (outputs, inputs) of inputs that are the same at every pixel."""
    return module.weight.detach()[..., None].flatten(2).sum(2)


def foldable(module: nn.Module, values: Tensor) -> Tensor:
    """Return whether a layer reads a single constant from each input: bool (inputs,).

    Zero padding adds zeros to an input, so there the constant must be 0.
    """
    padded = isinstance(module, nn.Conv2d) and module.padding_mode == "zeros"
    if padded and module.padding not in ((0, 0), "valid"):
        return values == 0
    return ~values.isnan()
