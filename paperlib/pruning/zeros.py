"""Where the zeros of a pruned filter go: from its convolution to the next layers that mix channels.

A pruned filter's weights and bias are zero, and so is its output. `Trail` follows that output
through a traced network to every use. On the way it collects the further parameters that must be
zero (scale and shift of the norms that follow) and the residual sums that need a mask. It fails
closed: an operation that it does not know is refused, and so is one that turns a zero into
something else which the next layer reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from paperlib.models import ResidualSum
from paperlib.pruning import operations as ops
from paperlib.pruning.graph import Traced
from paperlib.pruning.operations import CONVOLUTIONS, NORMS
from paperlib.pruning.shapes import Layout, argument, channels_of, laid_out, norm_channels
from paperlib.pruning.sums import Sums


class Refused(Exception):
    """A filter's zeros cannot be followed; the message says why, as a sentence's end."""


class OnShortcut(Exception):
    """The convolution is on the shortcut of a residual sum, which the message names."""


@dataclass(frozen=True)
class Channels:
    """Where one convolution's filters are in a tensor that has its channels in dimension 1.

    Attributes:
        total: how many channels the tensor has, None where that is not known.
        offsets: the channels from which on copies of the filters lie; None where not known.
        dims: the tensor's number of dimensions.
        flat: a channel is several features, as after a flattening.
        direct: there is no activation between the convolution and this tensor.
        normed: there is a norm between them.
        spoilt: the operation that turns a zero into something else; None while zeros are zero.
    """

    total: int | None
    offsets: tuple[int, ...] | None = (0,)
    dims: int = 4
    flat: bool = False
    direct: bool = True
    normed: bool = False
    spoilt: fx.Node | None = None

    def aligned(self, filters: int) -> bool:
        """Whether the tensor's channels are these filters, one for one, and it is not flattened."""
        return (self.total, self.offsets, self.dims, self.flat) == (filters, (0,), 4, False)

    def same_place(self, other: "Channels") -> bool:
        """Whether the filters are where they are in another tensor."""
        mine, its = ((c.offsets, c.dims, c.flat) for c in (self, other))
        return mine == its and self.offsets is not None


@dataclass(frozen=True)
class Entries:
    """Parameters of a module that are zero with a convolution's filters.

    Of filter i these are `repeat` entries from `offset + i * repeat` on, at each of the offsets.
    """

    module: nn.Module
    parameters: tuple[str, ...]
    offsets: tuple[int, ...] = (0,)
    repeat: int = 1

    @property
    def device(self) -> torch.device:
        """Where these parameters are."""
        return getattr(self.module, self.parameters[0]).device

    def of(self, filters: Tensor) -> Tensor:
        """Return the indices of these filters' entries, for indices of filters (n,)."""
        if self.offsets == (0,) and self.repeat == 1:
            return filters
        within = torch.arange(self.repeat, device=filters.device)
        begins = torch.cat([filters * self.repeat + offset for offset in self.offsets])
        return (begins[:, None] + within).flatten()


@dataclass(frozen=True)
class Mask:
    """A module that masks a residual sum of so many channels; the filters lie at the offsets."""

    module: nn.Module
    channels: int
    offsets: tuple[int, ...] = (0,)


class Trail:
    """Follows the output of one convolution through a network.

    Attributes:
        entries: by name of module, parameters that have to be zero with a filter of it.
        masks: by name of module, masks that residual sums need.
        norms: names of the norms of its output alone, before any activation.
        observed: name of the `ResidualSum` that adds to its output alone, or None.
        plain_sum: a sum that is not a `ResidualSum` does.
        passed: names of the modules that the filters pass through, their convolution first.

    Raises Refused or OnShortcut.
    """

    def __init__(self, traced: Traced, sums: Sums, name: str) -> None:
        self.traced, self.sums, self.name = traced, sums, name
        self.calls = traced.calls(name)
        self.filters = traced.modules[name].out_channels
        self.entries: dict[str, Entries] = {}
        self.masks: dict[str, Mask] = {}
        self.norms: list[str] = []
        self.observed: str | None = None
        self.plain_sum = False
        self._met: dict[str, set[fx.Node]] = {}
        self._at: dict[fx.Node, Channels] = {}
        for node in traced.graph.nodes:
            state = self._follow(node)
            if state is not None:
                self._at[node] = state
        self.passed = [node.target for node in self._at if node.op == "call_module"]
        self._check_not_shared()

    def _follow(self, node: fx.Node) -> Channels | None:
        """Where the filters are in a node's output, None where its zeros are of no effect on it."""
        found = [self._at[source] for source in node.all_input_nodes if source in self._at]
        state = None
        if found and node not in self.traced.shapes:
            state = self._rule(node)(node, found)
            self._check_in_place(node, state)
        if node in self.calls:
            return Channels(self.filters)
        return state

    def _rule(self, node: fx.Node) -> Callable[[fx.Node, list[Channels]], Channels | None]:
        key = self.traced.key(node)
        self._check("out" not in node.kwargs, node)
        if self.sums.is_part(node):
            # Its sum looks at what it adds.
            return lambda node, found: replace(found[0], spoilt=node)
        if self.sums.is_sum(node):
            return self._sum
        for keys, rule in (
            (ops.ELEMENTWISE, self._single_values),
            (ops.PASSING | ops.ACTIVATIONS | ops.SPATIAL, self._channel_by_channel),
            (ops.MIXING | {"output"}, self._mix),
            (NORMS, self._norm),
            (ops.CAT, self._cat),
            (ops.MOVES, self._move),
        ):
            if key in keys:
                return rule
        if getattr(key, "__name__", "") == "stochastic_depth":  # torchvision's
            return self._channel_by_channel
        raise Refused(
            f"it is not known whether {self.traced.describe(node)} keeps a pruned filter zero"
        )

    # Rules: from where the filters are in a node's inputs to where they are in its output

    def _single_values(self, node: fx.Node, found: list[Channels]) -> Channels:
        key, tensors, first = self.traced.key(node), self.traced.tensors(node), found[0]
        direct = key in ops.MULTIPLY | ops.ADD and all(c.direct for c in found)
        known = all(t in self._at or t.op == "get_attr" for t in tensors)
        if key in ops.MULTIPLY:
            # Zero times anything is zero; what has fewer dimensions is spread over the others'.
            zero = [c for c in found if c.spoilt is None] or found
            first = max(zero, key=lambda c: c.dims)
            self._check(first.dims == max(c.dims for c in found), node)
            self._check(first.dims == 4 or known, node)
            return replace(first, direct=direct)
        self._check(known, node)
        spoilt = next((c.spoilt for c in found if c.spoilt is not None), None)
        same = len(found) == len(tensors) and all(c.same_place(first) for c in found)
        if spoilt is None and not (same and self.traced.at_zero(node) == 0):
            spoilt = node  # also by a parameter, which is not zero
        return replace(first, direct=direct, spoilt=spoilt)

    def _channel_by_channel(self, node: fx.Node, found: list[Channels]) -> Channels:
        key, first = self.traced.key(node), found[0]
        self._check(len(found) == 1 and self.traced.tensors(node)[0] in self._at, node)
        if key in ops.ACROSS:
            self._check_unspoilt(node, found)
        if key in ops.SPATIAL:
            module = self.traced.module(node)
            indices = getattr(module, "return_indices", node.kwargs.get("return_indices"))
            self._check(not first.flat and first.dims > 2 and not indices, node)
        return replace(first, direct=first.direct and key not in ops.ACTIVATIONS)

    def _mix(self, node: fx.Node, found: list[Channels]) -> Channels | None:
        key, module, first = self.traced.key(node), self.traced.module(node), found[0]
        if key != "output":
            self._check(self.traced.tensors(node)[0] in self._at and len(found) == 1, node)
            self._check(first.dims == ops.dimensions(key), node)
        if key in ops.FUNCTIONAL_CONVOLUTIONS:
            self._check(argument(node, 6, "groups", 1) == 1, node)
        if key in CONVOLUTIONS and module.groups == module.in_channels > 1:
            # Every channel for itself.
            self._check(module.out_channels == module.in_channels, node)
            if module.bias is not None:
                self._zero(node, ("bias",), first)
            return replace(first, direct=False)
        self._check_unspoilt(node, found)
        return None

    def _norm(self, node: fx.Node, found: list[Channels]) -> Channels:
        norm, first = self.traced.module(node), found[0]
        if isinstance(norm, nn.GroupNorm):  # its statistics are of several channels
            self._check_unspoilt(node, found)
        if first.direct and not first.normed and first.aligned(self.filters):
            self.norms.append(node.target)
        names = tuple(n for n in ("weight", "bias") if getattr(norm, n) is not None)
        if names:
            self._zero(node, names, first)
            return replace(first, normed=True, spoilt=None)
        if isinstance(norm, nn.GroupNorm) or norm.running_mean is not None:
            raise Refused(
                f"{self.traced.describe(node)} has no scale and shift that could be zero: give it "
                "affine=True"
            )
        return replace(first, normed=True)

    def _cat(self, node: fx.Node, found: list[Channels]) -> Channels:
        first, parts = found[0], node.args[0] if node.args else ()
        dim = argument(node, 1, "dim", 0)
        self._check(isinstance(dim, int) and dim % first.dims == 1 and len(parts) > 0, node)
        self._check(all(c.dims == first.dims for c in found), node)
        total, offsets = 0, ()
        for part in parts:
            channels = self._at.get(part, Channels(channels_of(self.traced, part), ()))
            if offsets is not None and channels.offsets:
                known = total is not None and not channels.flat
                offsets = (*offsets, *(total + o for o in channels.offsets)) if known else None
            elif channels.offsets is None:
                offsets = None
            total = None if None in (total, channels.total) else total + channels.total
        spoilt = next((c.spoilt for c in found if c.spoilt is not None), None)
        flat = any(c.flat for c in found)
        return replace(first, total=total, offsets=offsets, flat=flat, spoilt=spoilt)

    def _move(self, node: fx.Node, found: list[Channels]) -> Channels:
        alone = self.traced.tensors(node) == node.all_input_nodes[:1]
        self._check(alone and len(found) == 1, node)
        first = found[0]
        before = Layout(first.total, first.dims, first.flat)
        after = laid_out(
            self.traced, node, before, lambda n: n in self._at or n.op == "placeholder"
        )
        self._check(after is not None, node)
        offsets = first.offsets and tuple(offset + after.shift for offset in first.offsets)
        return replace(
            first, total=after.channels, offsets=offsets, dims=after.dims, flat=after.flat
        )

    def _sum(self, node: fx.Node, found: list[Channels]) -> Channels | None:
        operands, branch = self.sums.operands(node), self.sums.branch(node)
        found = [self._at[operand] for operand in operands if operand in self._at]
        first, what = found[0], self.traced.describe(node)
        if len(found) == len(operands) and all(c.same_place(first) for c in found):
            spoilt = next((c.spoilt for c in found if c.spoilt is not None), None)
            return replace(first, direct=False, spoilt=spoilt)
        if branch in self._at:
            self._check_unspoilt(node, found)
            return self._ends_branch(node, self._at[branch])
        if branch is None:
            raise OnShortcut(f"none of what {what} adds is deeper than the others")
        if not self.sums.behind(branch) & set(self.calls):
            raise OnShortcut(f"it is on the shortcut of the residual sum {what}")
        self._check_unspoilt(node, found)
        return None

    # What a rule needs and finds

    def _ends_branch(self, node: fx.Node, channels: Channels) -> Channels:
        """The filters end the branch of a sum, to which its shortcuts then add nothing."""
        where = self.sums.where_to_mask(node)
        known = channels.total is not None and channels.offsets is not None
        if where is None or not known or channels.dims != 4 or channels.flat:
            raise Refused(
                f"no module returns the residual sum {self.traced.describe(node)}: add with "
                "paperlib.models.ResidualSum() instead, so that its shortcut can be masked"
            )
        module = self.traced.modules[where]
        self._note(self.masks, where, Mask(module, channels.total, channels.offsets))
        if channels.direct and channels.aligned(self.filters):
            if isinstance(module, ResidualSum):
                self.observed = where
            else:
                self.plain_sum = True
        return replace(channels, direct=False)

    def _zero(self, node: fx.Node, names: tuple[str, ...], channels: Channels) -> None:
        """The filters' entries of these parameters of a module are zero with the filters."""
        module = self.traced.module(node)
        size = norm_channels(module) if isinstance(module, NORMS) else module.out_channels
        known = channels.total is not None and channels.offsets is not None
        repeat = size // channels.total if known else 0
        fits = known and repeat * channels.total == size and (channels.flat or repeat == 1)
        self._check(fits, node)
        offsets = tuple(offset * repeat for offset in channels.offsets)
        self._met.setdefault(node.target, set()).add(node)
        self._note(self.entries, node.target, Entries(module, names, offsets, repeat))

    def _note(self, where: dict, name: str, value: Entries | Mask) -> None:
        if where.setdefault(name, value) != value:
            raise Refused(f"{name!r} is used more than once, with other channels each time")

    def _check_unspoilt(self, node: fx.Node, found: Sequence[Channels]) -> None:
        for spoilt in (c.spoilt for c in found if c.spoilt is not None):
            raise Refused(
                f"{self.traced.describe(spoilt)} turns its zeros into something else, which "
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
            if self._met[name] != set(self.traced.calls(name)):
                raise Refused(f"{name!r}, which would have to be zero with it, is used elsewhere")
        for name, mask in self.masks.items():
            outputs = [self._at.get(node) for node in self.traced.returns[name]]
            if any(c is None or c.spoilt or c.offsets != mask.offsets for c in outputs):
                raise Refused(
                    f"{name!r} returns its residual sum and, elsewhere, something else: add with "
                    "paperlib.models.ResidualSum() instead, so that its shortcut can be masked"
                )

    def _check_in_place(self, node: fx.Node, state: Channels | None) -> None:
        """What was written into must not be used again, but where its zeros are zero as before."""
        module, key = self.traced.module(node), self.traced.key(node)
        writes = ops.in_place(key, getattr(module, "inplace", node.kwargs.get("inplace")))
        if not writes or not node.args or not isinstance(node.args[0], fx.Node):
            return
        still_zero = state is not None and state.spoilt is None and not self.sums.is_sum(node)
        if still_zero and node.args[0] in self._at:
            return
        base = node.args[0]
        while self._is_view(base):
            base = base.all_input_nodes[0]
        views = {base}
        for other in self.traced.graph.nodes:
            if other is not node and self._is_view(other) and other.all_input_nodes[0] in views:
                views.add(other)
        last = max(self.traced.order[u] for v in views for u in v.users)
        if last > self.traced.order[node]:
            raise Refused(
                f"{self.traced.describe(node)} writes into a tensor that is used again afterwards"
            )

    def _is_view(self, node: fx.Node) -> bool:
        module, key = self.traced.module(node), self.traced.key(node)
        if not node.all_input_nodes or node in self.traced.shapes:
            return False
        writes = ops.in_place(key, getattr(module, "inplace", node.kwargs.get("inplace")))
        return writes or key in ops.PASSING | ops.MOVES
