"""Where the zeros of a pruned filter go: from its convolution to the next layers that mix channels.

A pruned filter's weights and bias are zero, and so is its output. `Trail` follows that output
through a traced network to every use. On the way it collects the further parameters that must be
zero (scale and shift of the norms that follow) and the modules whose output must be masked, because
a shortcut fills the filter again. It fails closed: an operation that it does not know is refused,
and so is one that turns a zero into something else which the next layer reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from paperlib.models import ResidualSum
from paperlib.pruning import operations as ops
from paperlib.pruning.graph import argument
from paperlib.pruning.operations import CONVOLUTIONS, NORMS
from paperlib.pruning.shapes import Layout, Network, norm_channels, operands, padding


class Refused(Exception):
    """A filter's zeros cannot be followed; the message says why, as a sentence's end."""


class OnShortcut(Exception):
    """The convolution is on the shortcut of a residual sum, which the message names."""


@dataclass(frozen=True)
class Zeros:
    """The filters of one convolution in a tensor.

    Attributes:
        offsets: the channels from which on copies of the filters lie; None where not known.
        direct: there is no activation between the convolution and this tensor.
        normed: there is a norm between them.
        spoilt: the operation that turns a zero into something else; None while zeros are zero.
    """

    offsets: tuple[int, ...] | None = (0,)
    direct: bool = True
    normed: bool = False
    spoilt: fx.Node | None = None


@dataclass(frozen=True)
class Entries:
    """Parameters of a module that are zero with a convolution's filters.

    Of filter i these are `repeat` entries from `offset + i * repeat` on, at each of the offsets.
    """

    module: nn.Module
    parameters: tuple[str, ...]
    offsets: tuple[int, ...] = (0,)
    repeat: int = 1

    def of(self, filters: Tensor) -> Tensor:
        """Return the indices of these filters' entries, for indices of filters (n,)."""
        within = torch.arange(self.repeat, device=filters.device)
        begins = torch.cat([filters * self.repeat + offset for offset in self.offsets])
        return (begins[:, None] + within).flatten()


@dataclass(frozen=True)
class Mask:
    """A module whose output is masked in so many channels; the filters lie at the offsets."""

    module: nn.Module
    channels: int
    offsets: tuple[int, ...] = (0,)


class Trail:
    """Follows the output of one convolution through a network, in each of its modes.

    Attributes:
        entries: by name of module, parameters that have to be zero with a filter of it.
        masks: by name of module, masks that residual sums need.
        norms: the norms of its output alone, before any activation.
        sums: the residual sums that add to its output alone, None for one that is no module.
        passed: names of the modules that the filters pass through, their convolution first.
        uses: how many times a forward pass calls the convolution.

    Raises Refused or OnShortcut.
    """

    def __init__(self, networks: Sequence[Network], name: str) -> None:
        self.entries: dict[str, Entries] = {}
        self.masks: dict[str, Mask] = {}
        self.norms: set[nn.Module] = set()
        self.sums: set[nn.Module | None] = set()
        self.passed: list[str] = []
        self.uses = 0
        for network in networks:
            self.network, self.traced = network, network.traced
            self.calls = self.traced.calls(name)
            self.uses = max(self.uses, len(self.calls))
            self._met: dict[str, set[fx.Node]] = {}
            self._at: dict[fx.Node, Zeros] = {}
            for node in self.traced.graph.nodes:
                state = self._follow(node)
                if state is not None:
                    self._at[node] = state
            self.passed += [self.traced.name(n) for n in self._at if n.op == "call_module"]
            self._check_not_shared()

    def _follow(self, node: fx.Node) -> Zeros | None:
        """Where the filters are in a node's output, None where its zeros are of no effect on it."""
        found = [self._at[source] for source in node.all_input_nodes if source in self._at]
        state = None
        if found and node not in self.traced.shapes:
            self._check("out" not in node.kwargs, node)
            state = self._rule(node)(node, found)
            still_zero = state is not None and not state.spoilt
            if self._writes(node) and not (still_zero and node.all_input_nodes[0] in self._at):
                self._check_in_place(node)
            if state is not None and self._is_sum(state.spoilt) and self._can_mask(node, state):
                name = self.network.returned[node]
                channels = self.network.layouts[node].channels or 0
                mask = Mask(self.traced.modules[name], channels, state.offsets or ())
                self._note(self.masks, name, mask)
                state = replace(state, spoilt=None)
        return Zeros() if node in self.calls else state

    def _rule(self, node: fx.Node) -> Callable[[fx.Node, list[Zeros]], Zeros | None]:
        key = self.traced.key(node)
        if self._is_sum(node):
            return self._sum
        for keys, rule in (
            (ops.STACK, self._stack),
            (ops.MULTIPLY, self._multiply),
            (ops.ELEMENTWISE, self._single_values),
            (ops.PASSING | ops.ACTIVATIONS | ops.SPATIAL, self._channel_by_channel),
            (ops.MIXING | {"output"}, self._mix),
            (NORMS, self._norm),
            (ops.CAT, self._cat),
            (ops.MOVES, self._move),
        ):
            if key in keys:
                return rule
        raise Refused(
            f"it is not known whether {self.traced.describe(node)} keeps a pruned filter zero"
        )

    # Rules: from where the filters are in a node's inputs to where they are in its output

    def _multiply(self, node: fx.Node, found: list[Zeros]) -> Zeros:
        """Zero times anything is zero; what has fewer dimensions is spread over the others'."""
        mine = {t: self._at[t] for t in self.traced.tensors(node) if t in self._at}
        zero = [t for t, state in mine.items() if state.spoilt is None] or list(mine)
        first = max(zero, key=lambda t: self._layout(t, node).dims)
        dims = self._layout(first, node).dims
        self._check(dims == max(self._layout(t, node).dims for t in mine), node)
        self._check(dims == 4 or self._known(node), node)
        return replace(mine[first], direct=all(state.direct for state in found))

    def _single_values(self, node: fx.Node, found: list[Zeros]) -> Zeros:
        tensors = self.traced.tensors(node)
        self._check(self._known(node), node)
        direct = self.traced.key(node) in ops.ADD and all(state.direct for state in found)
        together = self._together(tensors, direct)
        if together is not None and self.traced.at_zero(node) == 0:
            return together
        # Also by a parameter, which is not zero.
        spoilt = next((s.spoilt for s in found if s.spoilt and not self._is_sum(s.spoilt)), node)
        return replace(found[0], direct=direct, spoilt=spoilt)

    def _channel_by_channel(self, node: fx.Node, found: list[Zeros]) -> Zeros:
        key, module = self.traced.key(node), self.traced.module(node)
        tensor = self.traced.tensors(node)[0]
        self._check(len(found) == 1 and tensor in self._at, node)
        if key in ops.ACROSS:
            self._check_unspoilt(node, found)
        if key in ops.SPATIAL:
            layout = self._layout(tensor, node)
            indices = getattr(module, "return_indices", node.kwargs.get("return_indices"))
            self._check(not layout.flat and layout.dims > 2 and not indices, node)
        return replace(found[0], direct=found[0].direct and key not in ops.ACTIVATIONS)

    def _mix(self, node: fx.Node, found: list[Zeros]) -> Zeros | None:
        key, module = self.traced.key(node), self.traced.module(node)
        if key != "output":
            tensor = self.traced.tensors(node)[0]
            self._check(tensor in self._at and len(found) == 1, node)
            self._check(self._layout(tensor, node).dims == ops.dimensions(key), node)
        if key in ops.FUNCTIONAL_CONVOLUTIONS:
            self._check(argument(node, 6, "groups", 1) == 1, node)
        if key in CONVOLUTIONS and module.groups == module.in_channels > 1:
            # Every channel for itself.
            self._check(module.out_channels == module.in_channels, node)
            if module.bias is not None:
                self._zero(node, ("bias",), found[0])
            return replace(found[0], direct=False)
        self._check_unspoilt(node, found)
        return None

    def _norm(self, node: fx.Node, found: list[Zeros]) -> Zeros:
        norm, state = self.traced.module(node), found[0]
        if isinstance(norm, nn.GroupNorm):  # its statistics are of several channels
            self._check_unspoilt(node, found)
        if state.direct and not state.normed and self._aligned(self.traced.tensors(node)[0], state):
            self.norms.add(norm)
        names = tuple(n for n in ("weight", "bias") if getattr(norm, n) is not None)
        if names:
            self._zero(node, names, state)
            return replace(state, normed=True, spoilt=None)
        if isinstance(norm, nn.GroupNorm) or norm.running_mean is not None:
            raise Refused(
                f"{self.traced.describe(node)} has no scale and shift that could be zero: give it "
                "affine=True"
            )
        return replace(state, normed=True)

    def _cat(self, node: fx.Node, found: list[Zeros]) -> Zeros:
        parts, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
        self._check(isinstance(parts, tuple | list), node)
        dims = {self._layout(part, node).dims for part in parts if part in self._at}
        self._check(len(dims) == 1 and isinstance(dim, int) and dim % max(dims) == 1, node)
        before: int | None = 0
        offsets: tuple[int, ...] | None = ()
        for part in parts:
            layout, state = self.network.layouts.get(part), self._at.get(part)
            if state is not None:
                mine = state.offsets if layout is not None and not layout.flat else None
                if offsets is None or mine is None or before is None:
                    offsets = None
                else:
                    offsets += tuple(before + offset for offset in mine)
            channels = layout.channels if layout is not None else None
            before = None if before is None or channels is None else before + channels
        spoilt = next((state.spoilt for state in found if state.spoilt is not None), None)
        return replace(found[0], offsets=offsets, spoilt=spoilt)

    def _move(self, node: fx.Node, found: list[Zeros]) -> Zeros:
        self._check(len(found) == 1 and node in self.network.layouts, node)
        if self.traced.key(node) not in ops.PAD:
            return found[0]
        pads = padding(self.traced.module(node), node)
        [front] = [*pads[2 * self.network.layouts[node].dims - 4 :], 0][:1]
        offsets = found[0].offsets and tuple(offset + front for offset in found[0].offsets)
        return replace(found[0], offsets=offsets)

    def _stack(self, node: fx.Node, found: list[Zeros]) -> Zeros:
        """Its sum looks at what is stacked."""
        readers = self.traced.readers(node)
        self._check(len(readers) == 1 and self._is_sum(readers[0]), node)
        return replace(found[0], spoilt=node)

    def _sum(self, node: fx.Node, found: list[Zeros]) -> Zeros | None:
        terms, branch = operands(self.traced, node), self.network.branch(node)
        together = self._together(terms, direct=False)
        if together is not None:
            return together
        if branch is not None and branch in self._at:
            state = self._at[branch]
            if state.direct and self._aligned(branch, state):
                module = self.traced.module(node)
                self.sums.add(module if isinstance(module, ResidualSum) else None)
            return replace(state, direct=False, spoilt=state.spoilt or node)
        if branch is None:
            what = self.traced.describe(node)
            raise OnShortcut(f"none of what {what} adds is deeper than the others")
        if not self.network.behind[branch] & set(self.calls):
            what = self.traced.describe(node)
            raise OnShortcut(f"it is on the shortcut of the residual sum {what}")
        self._check_unspoilt(node, [self._at[term] for term in terms if term in self._at])
        return None

    # What a rule needs and finds

    def _layout(self, tensor: fx.Node, node: fx.Node) -> Layout:
        self._check(tensor in self.network.layouts, node)
        return self.network.layouts[tensor]

    def _is_sum(self, node: fx.Node | None) -> bool:
        return node is not None and bool(operands(self.traced, node))

    def _known(self, node: fx.Node) -> bool:
        """Whether all inputs have the filters, or are parameters."""
        return all(t in self._at or t.op == "get_attr" for t in self.traced.tensors(node))

    def _aligned(self, tensor: fx.Node, state: Zeros) -> bool:
        """Whether a tensor's channels are these filters, one for one, and it is not flattened."""
        layout, filters = self.network.layouts.get(tensor), self.network.layouts[self.calls[0]]
        aligned = layout is not None and replace(layout, pixel=False) == filters
        return aligned and state.offsets == (0,)

    def _together(self, tensors: Sequence[fx.Node], direct: bool) -> Zeros | None:
        """The filters in what is made of tensors that all have them in the same place, or None."""
        states = [self._at[tensor] for tensor in tensors if tensor in self._at]
        places = {
            (self._at[t].offsets, layout.dims, layout.flat)
            for t in tensors
            if t in self._at and (layout := self._layout(t, t))
        }
        if len(states) < len(tensors) or len(places) > 1 or states[0].offsets is None:
            return None
        spoilt = next((state.spoilt for state in states if state.spoilt is not None), None)
        return replace(states[0], direct=direct, spoilt=spoilt)

    def _can_mask(self, node: fx.Node, state: Zeros) -> bool:
        """Whether a module returns this node, no more often than the convolution is called.

        Hooks of the network itself are none of its graph, so that it cannot mask.
        """
        layout, name = self.network.layouts[node], self.network.returned.get(node, "")
        if not 0 < len(self.traced.returns.get(name, ())) <= len(self.calls):
            return False
        if isinstance(self.traced.module(node), ResidualSum) and state.spoilt is not node:
            return False  # it masks its own shortcut only
        return layout.channels is not None and state.offsets is not None and layout.dims == 4

    def _zero(self, node: fx.Node, names: tuple[str, ...], state: Zeros) -> None:
        """The filters' entries of these parameters of a module are zero with the filters."""
        module = self.traced.module(node)
        size = norm_channels(module) if isinstance(module, NORMS) else module.out_channels
        layout = self._layout(self.traced.tensors(node)[0], node)
        channels, name = layout.channels or size + 1, self.traced.name(node)
        repeat = size // channels
        fits = repeat * channels == size and (layout.flat or repeat == 1)
        self._check(fits and state.offsets is not None, node)
        offsets = tuple(offset * repeat for offset in state.offsets or ())
        self._met.setdefault(name, set()).add(node)
        self._note(self.entries, name, Entries(module, names, offsets, repeat))

    def _note(self, where: dict, name: str, value: Entries | Mask) -> None:
        if where.setdefault(name, value) != value:
            raise Refused(f"{name!r} is used more than once, with other channels each time")

    def _check_unspoilt(self, node: fx.Node, found: Sequence[Zeros]) -> None:
        for spoilt in (state.spoilt for state in found if state.spoilt is not None):
            what = self.traced.describe(spoilt)
            if self._is_sum(spoilt):
                raise Refused(
                    f"no module returns the residual sum {what}: add with "
                    "paperlib.models.ResidualSum() instead, so that its shortcut can be masked"
                )
            raise Refused(
                f"{what} turns its zeros into something else, which "
                f"{self.traced.describe(node)} reads"
            )

    def _check(self, understood: bool, node: fx.Node) -> None:
        if not understood:
            raise Refused(
                f"it is not known how {self.traced.describe(node)} treats the channels of a pruned "
                "filter here"
            )

    def _check_not_shared(self) -> None:
        """Refuse a module that must be zero for this convolution but is also used elsewhere."""
        for name in self.entries:
            if self._met.get(name, set()) != set(self.traced.calls(name)):
                raise Refused(f"{name!r}, which would have to be zero with it, is used elsewhere")
        for name, mask in self.masks.items():
            nodes = self.traced.returns.get(name, ())
            states = [self._at.get(node) if node is not None else None for node in nodes]
            if any(s is None or s.spoilt or s.offsets != mask.offsets for s in states):
                raise Refused(
                    f"{name!r} returns its residual sum and, elsewhere, something else: add with "
                    "paperlib.models.ResidualSum() instead, so that its shortcut can be masked"
                )

    def _check_in_place(self, node: fx.Node) -> None:
        """Refuse a write into a tensor that is used again afterwards."""
        base = node
        while base is node or self._is_view(base):
            by, base = base, base.all_input_nodes[0]
            others = [user for user in self.traced.readers(base) if user is not by]
            if any(user > node or self._is_view(user) for user in others):
                what = self.traced.describe(node)
                raise Refused(f"{what} writes into a tensor that is used again afterwards")

    def _writes(self, node: fx.Node) -> bool:
        """Whether an operation writes into its first argument."""
        key, module = self.traced.key(node), self.traced.module(node)
        name = key if isinstance(key, str) else getattr(key, "__name__", "")
        options = node.args[1:] if key in ops.ELEMENTWISE else ()
        options = (*options, node.kwargs.get("inplace"), getattr(module, "inplace", False))
        return name.endswith("_") or key in ops.WRITING or any(value is True for value in options)

    def _is_view(self, node: fx.Node) -> bool:
        """Whether a node's output may share its memory with its first input."""
        viewing = self._writes(node) or self.traced.key(node) in ops.VIEWING
        return viewing and bool(node.all_input_nodes)
