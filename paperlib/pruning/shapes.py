"""How each tensor of a traced network is laid out, as far as its layers and operations tell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from paperlib.models import ResidualSum
from paperlib.pruning import operations as ops
from paperlib.pruning.graph import Traced, argument
from paperlib.pruning.operations import CONVOLUTIONS, NORMS, TRANSPOSED


@dataclass(frozen=True)
class Layout:
    """How a tensor (images, channels, ...) is laid out.

    Attributes:
        channels: how many there are, None where that is not known.
        dims: its number of dimensions.
        flat: a channel is several features, one after the other.
        pixel: it has been pooled to one pixel.
    """

    channels: int | None
    dims: int = 4
    flat: bool = False
    pixel: bool = False


def layouts(traced: Traced) -> dict[fx.Node, Layout]:
    """Return the layout of each tensor that has images and channels in its first dimensions.

    A tensor whose images or channels may be mixed up has none.
    """
    found: dict[fx.Node, Layout] = {}
    for node in traced.graph.nodes:
        layout = None if node in traced.shapes else _layout(traced, node, found)
        if layout is not None:
            found[node] = layout
    return found


def norm_channels(norm: Any) -> int:
    """Return how many channels a norm's scale and shift have."""
    return norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features


def operands(traced: Traced, node: fx.Node) -> list[fx.Node]:
    """Return the tensors that a sum adds, in whatever form it is written; none if it is no sum."""
    key = traced.key(node)
    if key in ops.REDUCE and _is_over_stack(traced, node):
        node = node.all_input_nodes[0]
    elif key is not ResidualSum and key not in ops.ADD:
        return []
    tensors = [source for source in traced.tensors(node) if source.op != "get_attr"]
    return tensors if len(tensors) > 1 else []


def _is_over_stack(traced: Traced, node: fx.Node) -> bool:
    """Whether a reduction is over the dimension that a stack of tensors has made for it."""
    stack = node.all_input_nodes[0]
    if traced.key(stack) not in ops.STACK or len(stack.users) > 1:
        return False
    made, reduced = argument(stack, 1, "dim", 0), argument(node, 1, "dim")
    return reduced in (made, [made], (made,)) and not argument(node, 2, "keepdim", False)


def _layout(traced: Traced, node: fx.Node, found: Mapping[fx.Node, Layout]) -> Layout | None:
    key, module = traced.key(node), traced.module(node)
    inputs = operands(traced, node) or traced.tensors(node)
    if node.op == "placeholder":
        return Layout(None)
    if key in (*CONVOLUTIONS, *TRANSPOSED):
        return Layout(module.out_channels, ops.dimensions(key))
    known = [found[source] for source in inputs if source in found]
    if not known:
        return None
    first = known[0]
    if operands(traced, node) or key in ops.ELEMENTWISE:
        widest = max(known, key=lambda layout: layout.dims)
        channels = max(layout.channels or 0 for layout in known) or None
        if channels == 1 and any(x not in found or not found[x].channels for x in inputs):
            channels = None  # it is spread over those of another
        pixel = len(known) == len(inputs) and all(layout.pixel for layout in known)
        return replace(widest, channels=channels, pixel=pixel)
    if inputs[0] not in found:
        return None
    if key in ops.MIXING:
        channels = module.out_features if isinstance(module, nn.Linear) else None
        return Layout(channels, first.dims) if first.dims == ops.dimensions(key) else None
    if key in ops.CAT:
        listed = argument(node, 0, "tensors")
        if not isinstance(listed, tuple | list):
            return None
        parts = [found[source] for source in listed if source in found]
        counts = [part.channels for part in parts if part.channels is not None]
        channels = sum(counts) if len(counts) == len(listed) else None
        return replace(first, channels=channels, flat=any(part.flat for part in parts))
    if key in NORMS and not first.flat:
        return replace(first, channels=norm_channels(module))
    if key in ops.TO_A_SIZE:
        size = argument(node, 1, "output_size") if module is None else module.output_size
        return replace(first, pixel=size in (1, (1, 1), [1, 1]))
    if key in ops.SPATIAL:
        return replace(first, pixel=False)
    if key in ops.PASSING | ops.ACTIVATIONS or key in NORMS:
        return first
    alone = traced.tensors(node) == node.all_input_nodes[:1]
    return _moved(traced, node, found) if key in ops.MOVES and alone else None


def _moved(traced: Traced, node: fx.Node, found: Mapping[fx.Node, Layout]) -> Layout | None:
    key, before = traced.key(node), found[traced.tensors(node)[0]]
    dims = before.dims
    if key in ops.FLATTEN:
        return _flattened(traced.module(node), node, before)
    if key in ops.VIEW:
        return _viewed(traced, node, before, found)
    if key in ops.INDEX:
        return _indexed(node.args[1], before)
    if key in ops.PAD:
        return _padded(traced.module(node), node, before)
    dim = argument(node, 1, "dim")
    if key in ops.SQUEEZE and before.pixel and dim is None:
        return Layout(before.channels, 2)
    over = [dim] if isinstance(dim, int) else dim
    after = dims + (key in ops.UNSQUEEZE)
    if not over or not all(isinstance(d, int) and d % after >= 2 for d in over):
        return None
    if key in ops.UNSQUEEZE:
        return replace(before, dims=after)
    if key in ops.REDUCE and argument(node, 2, "keepdim", False):
        return replace(before, pixel=before.pixel or len(over) == dims - 2)
    if key in ops.SQUEEZE and not before.pixel:
        return None
    return replace(before, dims=dims - len(over))


def _flattened(module: nn.Module | None, node: fx.Node, before: Layout) -> Layout | None:
    start, end = argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1)
    if module is not None:
        start, end = module.start_dim, module.end_dim
    if not isinstance(start, int) or end not in (-1, before.dims - 1) or start % before.dims < 1:
        return None
    start %= before.dims
    return Layout(before.channels, start + 1, before.flat or (start == 1 and before.dims > 2))


def _viewed(
    traced: Traced, node: fx.Node, before: Layout, found: Mapping[fx.Node, Layout]
) -> Layout | None:
    sizes: Any = node.args[1:] or (node.kwargs.get("shape"),)
    sizes = tuple(sizes[0]) if isinstance(sizes[0], tuple | list) else sizes
    if len(sizes) < 2:
        return None
    images, channels = _size(sizes[0], found) == 0, sizes[1]
    flat = Layout(before.channels, 2, before.flat or before.dims > 2)
    if len(sizes) == 2 and images:
        return flat
    if len(sizes) == 2 and sizes[0] == -1 and isinstance(channels, int) and before.channels:
        # Rows of whole images, if of whole channels and nothing makes images of them again.
        after = [traced.key(n) for n in traced.graph.nodes if n > node]
        again = ops.CONVOLVING | ops.VIEW | ops.UNSQUEEZE | {nn.Unflatten, "unflatten"}
        return flat if channels % before.channels == 0 and not again.intersection(after) else None
    if _size(channels, found) == 1:
        of = channels.args[0]
        channels = found[of if of in found else of.args[0]].channels
    same = before.channels is not None and channels == before.channels
    return Layout(before.channels, len(sizes)) if images and same and not before.flat else None


def _size(node: Any, found: Mapping[fx.Node, Layout]) -> int | None:
    """Return of which dimension of a tensor with a layout a node is the size, None if of none."""
    if not isinstance(node, fx.Node) or len(node.args) != 2:
        return None
    of: Any
    of, dim = node.args
    if node.target in ops.INDEX and isinstance(of, fx.Node):
        whole = of.target == "size" and len(of.args) == 1
        of = of.args[0] if whole or (of.target is getattr and of.args[1] == "shape") else None
    elif node.target != "size":
        return None
    return dim if of in found and isinstance(dim, int) else None


def _indexed(index: object, before: Layout) -> Layout | None:
    index = index if isinstance(index, tuple) else (index,)
    if any(i is Ellipsis for i in index):
        at = next(k for k, i in enumerate(index) if i is Ellipsis)
        missing = before.dims - sum(i is not None and i is not Ellipsis for i in index)
        index = (*index[:at], *[slice(None)] * missing, *index[at + 1 :])
    if index[:2] != (slice(None), slice(None)):
        return None
    if not all(i is None or isinstance(i, int | slice) for i in index[2:]):
        return None
    change = sum(i is None for i in index) - sum(isinstance(i, int) for i in index)
    return replace(before, dims=before.dims + change)


def _padded(module: nn.Module | None, node: fx.Node, before: Layout) -> Layout | None:
    pads = padding(module, node)
    constant = module is not None or argument(node, 2, "mode", "constant") == "constant"
    value = getattr(module, "value", 0) if module is not None else argument(node, 3, "value")
    pixels = 2 * (before.dims - 2)
    if not isinstance(pads, tuple | list) or not all(isinstance(p, int) for p in pads[pixels:]):
        return None
    if before.flat or len(pads) > pixels + 2 or min(pads[pixels:], default=0) < 0:
        return None
    if value not in (None, 0) if constant else len(pads) > pixels:
        return None
    more = sum(pads[pixels:])
    channels = before.channels + more if before.channels is not None else None
    return replace(before, channels=channels, pixel=False)


def padding(module: Any, node: fx.Node) -> Sequence[int]:
    """Return the entries that a padding adds, before and after each dimension, the last first."""
    return module.padding if module is not None else argument(node, 1, "pad")


class Network:
    """A traced network with the layout of its tensors, its sums, and what its modules return."""

    def __init__(self, model: nn.Module, training: bool) -> None:
        self.traced = Traced(model, training)
        self.layouts = layouts(self.traced)
        self.returned = {
            node: name for name, nodes in self.traced.returns.items() for node in nodes if node
        }
        # Each node with all that it is computed from.
        self.behind: dict[fx.Node, set[fx.Node]] = {}
        for node in self.traced.graph.nodes:
            before = (self.behind[source] for source in self.traced.tensors(node))
            self.behind[node] = {node}.union(*before)

    def branch(self, node: fx.Node) -> fx.Node | None:
        """Return the operand that is a sum's branch, None where no operand is the deepest.

        It is the one with the most convolutions, one after the other, that are behind no other
        operand; the others are shortcuts. Of a `ResidualSum` it is the first operand.
        """
        if self.traced.key(node) is ResidualSum:
            return argument(node, 0, "branch")
        terms = operands(self.traced, node)
        depths = []
        for term in terms:
            others = (self.behind[other] for other in terms if other is not term)
            depths.append(self._depth(self.behind[term].difference(*others)))
        return terms[depths.index(max(depths))] if depths.count(max(depths)) == 1 else None

    def _depth(self, nodes: set[fx.Node]) -> int:
        """The most convolutions of these nodes that come one after the other."""
        depths: dict[fx.Node, int] = {}
        for node in sorted(nodes):
            before = (depths.get(source, 0) for source in node.all_input_nodes)
            depths[node] = (self.traced.key(node) in ops.CONVOLVING) + max(before, default=0)
        return max(depths.values(), default=0)
