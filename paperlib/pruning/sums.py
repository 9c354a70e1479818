"""Residual sums in a traced network: their operands, which is the branch, and where to mask."""

from torch import fx

from paperlib.models import ResidualSum
from paperlib.pruning import operations as ops
from paperlib.pruning.graph import Traced
from paperlib.pruning.operations import CONVOLUTIONS, TRANSPOSED


class Sums:
    """The sums of a traced network, in whatever form they are written.

    A sum of sums is one sum. Its branch is the operand with the most convolutions, one after the
    other, that are behind no other operand; the others are shortcuts. Of a `ResidualSum` it is the
    first operand.
    """

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self._returned = {
            node: name for name, nodes in traced.returns.items() for node in nodes if node
        }
        self._branches: dict[fx.Node, fx.Node | None] = {}
        self._behind: dict[fx.Node, set[fx.Node]] = {}

    def is_sum(self, node: fx.Node) -> bool:
        """Whether a node adds two tensors or more that the network has computed."""
        return len(self._operands(node)) > 1

    def is_part(self, node: fx.Node) -> bool:
        """Whether a node does nothing but to be an operand of a sum that is not a `ResidualSum`."""
        if not (self._is_plain(node) or self.traced.key(node) in ops.STACK):
            return False
        readers = self.traced.readers(node)
        return len(readers) == 1 and self._is_plain(readers[0])

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """Return what a sum adds, its parts' operands in their stead."""
        found = []
        for operand in self._operands(node):
            part = self._is_plain(operand) and self.is_part(operand) and self._is_plain(node)
            found += self.operands(operand) if part else [operand]
        return found

    def branch(self, node: fx.Node) -> fx.Node | None:
        """Return the operand that is the sum's branch, None where no operand is the deepest."""
        if self.traced.key(node) is ResidualSum:
            return node.kwargs.get("branch", next(iter(node.args), None))
        if node not in self._branches:
            self._branches[node] = self._deepest(self.operands(node))
        return self._branches[node]

    def behind(self, node: fx.Node) -> set[fx.Node]:
        """Return a node and all that it is computed from."""
        if node not in self._behind:
            found, left = set(), [node]
            while left:
                one = left.pop()
                if one not in found:
                    found.add(one)
                    left += self.traced.tensors(one)
            self._behind[node] = found
        return self._behind[node]

    def where_to_mask(self, node: fx.Node) -> str | None:
        """Return a module whose output is this sum, or the sum after operations on single values.

        Nothing but these operations may read the sum before the module returns it. None where there
        is no such module: the network itself is none, as torch.fx does not see its hooks.
        """
        if self.traced.key(node) is ResidualSum:
            return node.target
        found: list[str] = []
        while True:
            found += [self._returned[node]] if node in self._returned else []
            readers = self.traced.readers(node)
            if len(readers) != 1 or not self._keeps_zero(readers[0]):
                break
            node = readers[0]
        return min(found, key=lambda name: len(self.traced.returns[name]), default=None)

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        key = self.traced.key(node)
        if key in ops.REDUCE and self._is_stack(node):
            node = node.all_input_nodes[0]
        elif key is not ResidualSum and key not in ops.ADD:
            return []
        return [source for source in self.traced.tensors(node) if source.op != "get_attr"]

    def _is_plain(self, node: fx.Node) -> bool:
        return self.is_sum(node) and self.traced.key(node) is not ResidualSum

    def _is_stack(self, node: fx.Node) -> bool:
        """Whether a reduction is over the dimension that a stack of tensors has made for it."""
        stack = next(iter(node.all_input_nodes), None)
        if stack is None:
            return False
        if self.traced.key(stack) not in ops.STACK or len(stack.users) != 1:
            return False
        made = stack.kwargs.get("dim", stack.args[1] if len(stack.args) > 1 else 0)
        reduced = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        keeps = node.kwargs.get("keepdim", len(node.args) > 2 and node.args[2])
        return not keeps and reduced in (made, [made], (made,))

    def _deepest(self, operands: list[fx.Node]) -> fx.Node | None:
        depths = []
        for operand in operands:
            others = set().union(*(self.behind(o) for o in operands if o is not operand))
            depths.append(self._depth(self.behind(operand) - others))
        return operands[depths.index(max(depths))] if depths.count(max(depths)) == 1 else None

    def _depth(self, nodes: set[fx.Node]) -> int:
        """The most convolutions of these nodes that come one after the other."""
        depths: dict[fx.Node, int] = {}
        for node in sorted(nodes, key=self.traced.order.__getitem__):
            key = self.traced.key(node)
            mixes = key in (*CONVOLUTIONS, *TRANSPOSED) or key in ops.FUNCTIONAL_CONVOLUTIONS
            before = (depths.get(source, 0) for source in node.all_input_nodes)
            depths[node] = mixes + max(before, default=0)
        return max(depths.values(), default=0)

    def _keeps_zero(self, node: fx.Node) -> bool:
        key = self.traced.key(node)
        if key in ops.PASSING | ops.MULTIPLY:
            return True
        alone = len(self.traced.tensors(node)) == 1
        return alone and key in ops.ELEMENTWISE and self.traced.at_zero(node) == 0
