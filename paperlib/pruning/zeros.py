"""Follow the zeros of a pruned filter from its convolution to the next layers that mix channels.

A pruned filter's weights and bias are zero, and so is its output. `Trail` follows that output
through a traced network to every use. On the way it collects the further parameters that must be
zero: scale and shift of the norms that follow, and biases of depthwise convolutions. It also
collects the modules whose output must be masked, because a shortcut fills the filter again. It
fails closed: it refuses every unknown operation. It also refuses an operation that turns a zero
into another value, if the next layer reads that value.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from paperlib.models import ResidualSum
from paperlib.pruning import operations as ops
from paperlib.pruning.features import Network
from paperlib.pruning.graph import argument
from paperlib.pruning.operations import CONVOLUTIONS, NORMS, TRANSPOSED

_FOLLOWED = ops.ELEMENTWISE | ops.PASSING | ops.ACTIVATIONS | ops.SPATIAL | ops.MOVES | ops.REDUCE


class Refused(Exception):
    """A filter's zeros cannot be followed; the message says why, as the end of a sentence."""


class OnShortcut(Refused):
    """The convolution is on the shortcut of a residual sum; the message names the sum."""


@dataclass(frozen=True)
class Zeros:
    """The places of one convolution's filters in a tensor.

    Attributes:
        filters: By feature, the filter that it comes from, -1 for none.
        direct: No activation, sum or depthwise convolution is between the convolution and this
            tensor.
        normed: A norm is between them.
        spoilt: The operation that turns a zero into another value; None while zeros are zero.
    """

    filters: tuple[int, ...]
    direct: bool = True
    normed: bool = False
    spoilt: fx.Node | None = None


@dataclass(frozen=True)
class Entries:
    """Entries of a module's parameters, or of its mask, that are zero with a convolution's filters.

    Attributes:
        module: The module.
        parameters: The parameters' names; empty for a mask.
        filters: By entry along the first dimension, its filter, -1 for none.
    """

    module: nn.Module
    parameters: tuple[str, ...]
    filters: tuple[int, ...]

    def of(self, filters: Tensor) -> Tensor:
        """Return the indices of the entries of some filters, given by their indices (n,)."""
        each = torch.tensor(self.filters, device=filters.device)
        return torch.isin(each, filters).nonzero().squeeze(1)


class Trail:
    """Follow the output of one convolution through a network, in each of its modes.

    Attributes:
        entries: By name of module, the parameters that must be zero with a filter.
        masks: By name of module, the masks that residual sums need.
        norms: The norms that read exactly its output, before any activation or other norm.
        sums: The residual sums whose branch is exactly its output, before any activation; None for
            a sum that is not a `ResidualSum`.
        passed: Names of the modules that the filters pass through, their convolution first.
        readers: Names of the modules that read the filters, or are given them.
        uses: How many times a forward pass calls the convolution.

    Raises:
        Refused: A filter's zeros cannot be followed.
        OnShortcut: The convolution is on the shortcut of a residual sum.
    """

    def __init__(self, networks: Sequence[Network], name: str) -> None:
        self.entries: dict[str, Entries] = {}
        self.masks: dict[str, Entries] = {}
        self.norms: set[nn.Module] = set()
        self.sums: set[nn.Module | None] = set()
        self.passed: list[str] = []
        self.readers: list[str] = []
        self.uses = 0
        for network in networks:
            self.network = network
            self.calls = network.calls(name)
            self.uses = max(self.uses, len(self.calls))
            self._at: dict[fx.Node, Zeros] = {}
            for node in network.graph.nodes:
                state = self._follow(node)
                if state is not None:
                    self._at[node] = state
            modules = [n for n in network.graph.nodes if n.op == "call_module"]
            self.passed += [network.name(n) for n in modules if n in self._at]
            read = (n for n in modules if self._at.keys() & n.all_input_nodes)
            self.readers += map(network.name, read)
            self._check_not_shared()

    def _follow(self, node: fx.Node) -> Zeros | None:
        """Return the places of the filters in a node's output, or None if none is there."""
        sources = self.network.operands[node] or node.all_input_nodes
        found = {source: self._at[source] for source in sources if source in self._at}
        state = None
        if found and node not in self.network.plain:
            self._check("out" not in node.kwargs, node)
            state = self._after(node, found)
            zero = state is not None and not state.spoilt and node.all_input_nodes[0] in self._at
            if node in self.network.written and not zero:
                self._check_written(node)
            if state is not None and self._is_sum(state.spoilt) and self._can_mask(node, state):
                name = self.network.returned[node]
                self._note(self.masks, name, Entries(self.network.modules[name], (), state.filters))
                state = replace(state, spoilt=None)
        if node in self.calls:
            self._check(len(self.network.shape(node)) == 4, node)
            return Zeros(tuple(range(self.network.shape(node)[1])))
        return state

    def _after(self, node: fx.Node, found: dict[fx.Node, Zeros]) -> Zeros | None:
        key = self.network.key(node)
        if self._is_sum(node):
            return self._sum(node, found)
        if key in ops.STACK:  # the rule for the sum reads the stacked tensors
            readers = self.network.readers(node)
            self._check(len(readers) == 1 and self._is_sum(readers[0]), node)
            return None
        [first, *others] = found.values()
        if key in ops.MIXING or key in NORMS:
            source = self.network.tensors(node)[0]
            self._check(source in found and not others, node)
            return self._norm(node, first) if key in NORMS else self._mix(node, first)
        if key == "output":
            self._check_unspoilt(node, [first, *others])
            return None
        if key in _FOLLOWED:
            return self._followed(node, found)
        raise Refused(
            f"it is not known whether {self.network.describe(node)} keeps a pruned filter zero"
        )

    # Rules: from the places of the filters in a node's inputs to those in its output

    def _followed(self, node: fx.Node, found: dict[fx.Node, Zeros]) -> Zeros:
        """Follow the filters through an operation in `_FOLLOWED`.

        Unknown values of the other inputs are nan, and so are results that depend on them.
        """
        key, spoilt = self.network.key(node), [s.spoilt for s in found.values() if s.spoilt]
        if key in ops.MULTIPLY:
            if len(spoilt) < len(found):  # zero times anything is zero
                found, spoilt = {t: s for t, s in found.items() if s.spoilt is None}, []
        elif key in ops.ELEMENTWISE:
            tensors = self.network.tensors(node)
            self._check(all(t in found or t.op == "get_attr" for t in tensors), node)
        if key in ops.ACROSS:
            self._check_unspoilt(node, found.values())
        filters = self._placed(node, found)
        activation = key in (ops.ELEMENTWISE | ops.ACTIVATIONS) - ops.MULTIPLY - ops.ADD
        direct = not activation and all(state.direct for state in found.values())
        first = replace(next(iter(found.values())), filters=filters, direct=direct)
        if key in ops.PASSING | ops.ACTIVATIONS | ops.SPATIAL | ops.REDUCE:
            return first
        values = {
            source: torch.where(torch.tensor(state.filters) < 0, torch.nan, 0.0)
            for source, state in found.items()
        }
        if (self.network.constants(node, values)[torch.tensor(filters) >= 0] == 0).all():
            return replace(first, spoilt=next(iter(spoilt), None))
        return replace(first, spoilt=next((s for s in spoilt if not self._is_sum(s)), node))

    def _placed(self, node: fx.Node, found: dict[fx.Node, Zeros]) -> tuple[int, ...]:
        """Return the filter of each feature of a node's output; the inputs must agree on it."""
        placed = []
        for source, state in found.items():
            origin = self.network.origin(node, source)
            self._check(origin is not None, node)
            assert origin is not None
            placed.append(torch.where(origin < 0, -1, torch.tensor(state.filters)[origin]))
        filters = torch.stack(placed).amax(0)
        self._check(all(((p == filters) | (p < 0)).all() for p in placed), node)
        return tuple(filters.tolist())

    def _mix(self, node: fx.Node, state: Zeros) -> Zeros | None:
        key, module = self.network.key(node), self.network.module(node)
        dims = ops.dimensions(key)
        self._check(len(self.network.shape(self.network.tensors(node)[0])) == dims, node)
        if key in ops.FUNCTIONAL_CONVOLUTIONS:
            self._check(argument(node, 6, "groups", 1) == 1, node)
        if key in (*CONVOLUTIONS, *TRANSPOSED) and module.groups == module.in_channels > 1:
            # In a depthwise convolution each output depends on one channel.
            self._check(module.out_channels == module.in_channels, node)
            if module.bias is not None:
                self._zero(node, ("bias",), state)
            return replace(state, direct=False)
        self._check_unspoilt(node, [state])
        return None

    def _norm(self, node: fx.Node, state: Zeros) -> Zeros:
        norm = self.network.module(node)
        if isinstance(norm, nn.GroupNorm):  # its statistics are over several channels
            self._check_unspoilt(node, [state])
        if state.direct and not state.normed and self._aligned(self.network.tensors(node)[0]):
            self.norms.add(norm)
        names = tuple(n for n in ("weight", "bias") if getattr(norm, n) is not None)
        if names:
            self._zero(node, names, state)
            return replace(state, normed=True, spoilt=None)
        if isinstance(norm, nn.GroupNorm) or norm.running_mean is not None:
            raise Refused(
                f"{self.network.describe(node)} has no scale and shift that could be zero: give it "
                "affine=True"
            )
        return replace(state, normed=True)

    def _sum(self, node: fx.Node, found: dict[fx.Node, Zeros]) -> Zeros | None:
        terms, branch = self.network.operands[node], self.network.branch(node)
        placed = {term: self._placed(node, {term: state}) for term, state in found.items()}
        if len(found) == len(terms) and len(set(placed.values())) == 1:
            spoilt = next((s.spoilt for s in found.values() if s.spoilt is not None), None)
            return Zeros(placed[terms[0]], False, found[terms[0]].normed, spoilt)
        what = self.network.describe(node)
        if branch in found:
            state = found[branch]
            if state.direct and self._aligned(branch):
                module = self.network.module(node)
                self.sums.add(module if isinstance(module, ResidualSum) else None)
            return Zeros(placed[branch], False, state.normed, state.spoilt or node)
        if branch is None:
            raise OnShortcut(f"none of what {what} adds is deeper than the others")
        if not self.network.behind[branch] & set(self.calls):
            raise OnShortcut(f"it is on the shortcut of the residual sum {what}")
        self._check_unspoilt(node, found.values())
        return None

    # Helpers of the rules

    def _is_sum(self, node: fx.Node | None) -> bool:
        return node is not None and bool(self.network.operands[node])

    def _aligned(self, tensor: fx.Node) -> bool:
        """Return whether a tensor's channels are the filters, one for one, and not flattened."""
        filters = tuple(range(self.network.shape(self.calls[0])[1]))
        return self._at[tensor].filters == filters and len(self.network.shape(tensor)) == 4

    def _can_mask(self, node: fx.Node, state: Zeros) -> bool:
        """Return whether a module returns this node, no more often than the convolution is called.

        The network itself cannot mask, because its hooks are not in its graph.
        """
        name = self.network.returned.get(node, "")
        if not 0 < len(self.network.returns.get(name, ())) <= len(self.calls):
            return False
        if isinstance(self.network.module(node), ResidualSum) and state.spoilt is not node:
            return False  # it masks its own shortcut only
        return len(self.network.shape(node)) == 4

    def _zero(self, node: fx.Node, names: tuple[str, ...], state: Zeros) -> None:
        """Note that the filters' entries of a module's parameters must be zero."""
        module, name = self.network.module(node), self.network.name(node)
        self._check(len(getattr(module, names[0])) == len(state.filters), node)
        self._note(self.entries, name, Entries(module, names, state.filters))

    def _note(self, where: dict, name: str, value: Entries) -> None:
        if where.setdefault(name, value) != value:
            raise Refused(f"{name!r} is used more than once, with other channels each time")

    def _check_unspoilt(self, node: fx.Node, found: Any) -> None:
        for spoilt in (state.spoilt for state in found if state.spoilt is not None):
            what = self.network.describe(spoilt)
            if self._is_sum(spoilt):
                raise Refused(
                    f"no module returns the residual sum {what}: add with "
                    "a paperlib.models.ResidualSum() for each sum, so that shortcuts can be masked"
                )
            raise Refused(
                f"{what} turns its zeros into something else, which "
                f"{self.network.describe(node)} reads"
            )

    def _check(self, understood: bool, node: fx.Node) -> None:
        if not understood:
            raise Refused(
                f"it is not known how {self.network.describe(node)} treats the channels of a "
                "pruned filter here"
            )

    def _check_not_shared(self) -> None:
        """Refuse a module that must be zero for this convolution but is also used elsewhere."""
        for name in self.entries:
            if any(call.all_input_nodes[0] not in self._at for call in self.network.calls(name)):
                raise Refused(f"{name!r}, which would have to be zero with it, is used elsewhere")
        for name, mask in self.masks.items():
            nodes = self.network.returns.get(name, ())
            states = [self._at.get(node) if node is not None else None for node in nodes]
            if any(s is None or s.spoilt or s.filters != mask.filters for s in states):
                raise Refused(
                    f"{name!r} returns its residual sum and, elsewhere, something else: add with "
                    "a paperlib.models.ResidualSum() for each sum, so that shortcuts can be masked"
                )

    def _check_written(self, node: fx.Node) -> None:
        """Refuse a write into a tensor that is used again afterwards."""
        for other in self.network.graph.nodes:
            later = other < node and any(user > node for user in self.network.readers(other))
            if later and self.network.share_memory(other, node):
                what = self.network.describe(node)
                raise Refused(f"{what} writes into a tensor that is used again afterwards")
