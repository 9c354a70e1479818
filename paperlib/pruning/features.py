"""Sizes of the tensors of a traced network, and the channels that each operation moves.

The features of a tensor are its entries along dimension 1: channels, or flattened channels. To find
sizes, the graph is run on the CPU. The run uses no weights, except in types of layers that are not
in `operations`.
"""

import copy
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from paperlib.models import ResidualSum
from paperlib.pruning import operations as ops
from paperlib.pruning.graph import Traced, argument, in_mode
from paperlib.pruning.operations import CONVOLUTIONS, NORMS, TRANSPOSED

# Image sizes to try if none is given. The first one at which the most nodes run is used.
SIZES = (32, 64, 96, 224, 28, 128, 8, 16, 4, 48, 256, 299)


class Network(Traced):
    """A traced network with the sizes of its tensors.

    Attributes:
        values: By node, a tensor of arbitrary numbers, or another object that the operation
            returns. A node that cannot be run has no entry.
        written: Nodes that write into one of their inputs.
        plain: Nodes that return a size, a type or the like, and no values of a tensor.
        operands: By node, the tensors that it adds, however the sum is written; empty if the node
            is not a sum.
        returned: By node that a module returns, the module's name.
        behind: By node, the node itself and all nodes that it is computed from.

    Args:
        model: The network.
        training: Whether the network is followed in training mode, or in evaluation mode.
        image: The size (channels, height, width) of its images; None tries those of `SIZES`.
    """

    def __init__(
        self, model: nn.Module, training: bool, image: Sequence[int] | None = None
    ) -> None:
        super().__init__(model, training)
        self.values: dict[fx.Node, Any] = {}
        self.written: set[fx.Node] = set()
        self.plain: set[fx.Node] = set()
        counted = torch.inference_mode(False)  # inference mode counts no writes
        with in_mode(model, training), counted, torch.no_grad(), torch.random.fork_rng(devices=[]):
            for size in [image] if image is not None else self._sizes():
                values, written, plain = self._run(model, size)
                if len(values) > len(self.values):
                    self.values, self.written, self.plain = values, written, plain
                if len(values) == len(self.graph.nodes):
                    break
        self.returned = {
            node: name for name, nodes in self.returns.items() for node in nodes if node
        }
        self.behind: dict[fx.Node, set[fx.Node]] = {}
        for node in self.graph.nodes:
            self.behind[node] = {node}.union(*(self.behind[s] for s in self.tensors(node)))
        self.operands = {node: self._terms(node) for node in self.graph.nodes}
        self._origins: dict[tuple[fx.Node, fx.Node], Tensor | None] = {}

    def _sizes(self) -> Iterable[tuple[int, int, int]]:
        convs = (m for n in self.graph.nodes if self.key(n) is nn.Conv2d for m in [self.module(n)])
        channels = next((conv.in_channels for conv in convs if conv.in_channels), 3)
        return [(channels, size, size) for size in SIZES]

    def _run(
        self, model: nn.Module, image: Sequence[int]
    ) -> tuple[dict[fx.Node, Any], set[fx.Node], set[fx.Node]]:
        values: dict[fx.Node, Any] = {}
        written: set[fx.Node] = set()
        plain: set[fx.Node] = set()
        for node in self.graph.nodes:
            inputs = [values[s] for s in node.all_input_nodes if isinstance(values.get(s), Tensor)]
            versions = [x._version for x in inputs]
            try:
                values[node] = self._value(model, node, values, image)
            except Exception:  # the value stays unknown
                continue
            if versions != [x._version for x in inputs]:
                written.add(node)
            told = node.args[1] if node.target is getattr else node.target
            from_plain = plain.issuperset(node.all_input_nodes) and node.op != "output"
            if (told in ops.TELLING or from_plain) and not isinstance(values[node], Tensor):
                plain.add(node)
        return values, written, plain

    def _value(
        self, model: nn.Module, node: fx.Node, values: Mapping[fx.Node, Any], image: Sequence[int]
    ) -> Any:
        key, module = self.key(node), self.module(node)
        if node.op == "placeholder":
            return node.args[0] if node.args else torch.ones(2, *image)
        if node.op == "get_attr":
            name = self.name(node)
            constant = self.attributes.get(name)
            value = operator.attrgetter(name)(model) if constant is None else constant
            return torch.ones(value.shape) if isinstance(value, Tensor) else value
        if node.op == "output":
            out = fx.map_arg(node.args[0], values.__getitem__)
            if isinstance(out, Tensor) and len(out) != 2:
                raise ValueError("the images are not of this size")
            return out
        if key in ops.ACTIVATIONS or key in (*NORMS, *CONVOLUTIONS, *TRANSPOSED, nn.Linear):
            x = values.get(node.all_input_nodes[0])
            if x is None and key is nn.Conv2d:  # later nodes can still be followed
                x = torch.ones(2, module.in_channels, *image[1:])
            return _layer(key, module, x)
        if key is not ResidualSum and module is not None and module.state_dict():
            return copy.deepcopy(module).cpu()(*fx.map_arg(node.args, values.__getitem__))
        return self.evaluate(node, values.__getitem__)

    def _terms(self, node: fx.Node) -> list[fx.Node]:
        """Return the tensors that a sum adds, however it is written; empty for other nodes.

        The reduction of a stack of tensors is a sum if it is over the dimension of the stack.
        """
        key, [source, *_] = self.key(node), [*node.all_input_nodes, None]
        if key in ops.REDUCE and source is not None and self.key(source) in ops.STACK:
            made, reduced = argument(source, 1, "dim", 0), argument(node, 1, "dim")
            over = reduced in (made, [made], (made,)) and not argument(node, 2, "keepdim", False)
            node = source
            if not over or len(source.users) > 1:
                return []
        elif key is not ResidualSum and key not in ops.ADD:
            return []
        tensors = [term for term in self.tensors(node) if term.op != "get_attr"]
        return tensors if len(tensors) > 1 else []

    # Questions about nodes

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return the size of a node's tensor, () if it is not a tensor or not known."""
        value = self.values.get(node)
        return tuple(value.shape) if isinstance(value, Tensor) else ()

    def tensors(self, node: fx.Node) -> list[fx.Node]:
        """Return the inputs of a node whose values it may use."""
        return [source for source in node.all_input_nodes if source not in self.plain]

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that may use the values of a node."""
        return [user for user in node.users if user not in self.plain]

    def share_memory(self, a: fx.Node, b: fx.Node) -> bool:
        """Return whether the tensors of two nodes share memory, or may share it."""
        if {a, b} & self.plain:
            return False
        if not self.shape(a) or not self.shape(b):
            return True
        first, second = (self.values[node].untyped_storage()._cdata for node in (a, b))
        return first == second

    def branch(self, node: fx.Node) -> fx.Node | None:
        """Return the operand of a sum that is its branch, None if no single operand is the deepest.

        The depth of an operand is its longest chain of convolutions that are behind no other
        operand. The other operands are shortcuts. The branch of a `ResidualSum` is its first
        operand.
        """
        if self.key(node) is ResidualSum:
            return argument(node, 0, "branch")
        terms = self.operands[node]
        depths = []
        for term in terms:
            others = (self.behind[other] for other in terms if other is not term)
            depths.append(self._depth(self.behind[term].difference(*others)))
        return terms[depths.index(max(depths))] if depths.count(max(depths)) == 1 else None

    def _depth(self, nodes: set[fx.Node]) -> int:
        """Return the number of convolutions in the longest chain of these nodes."""
        depths: dict[fx.Node, int] = {}
        for node in sorted(nodes):
            before = (depths.get(source, 0) for source in node.all_input_nodes)
            depths[node] = (self.key(node) in ops.CONVOLVING) + max(before, default=0)
        return max(depths.values(), default=0)

    # The origin of features, and their values

    def origin(self, node: fx.Node, source: fx.Node) -> Tensor | None:
        """Return the feature of an input that each feature of a node's output comes from.

        Returns:
            Integers (features,), -1 for a feature that does not come from this input; None if the
            origin is not known.
        """
        if (node, source) not in self._origins:
            self._origins[node, source] = self._find_origin(node, source)
        return self._origins[node, source]

    def _find_origin(self, node: fx.Node, source: fx.Node) -> Tensor | None:
        key, before, after = self.key(node), self.shape(source), self.shape(node)
        if len(before) < 2 or len(after) < 2:
            return None
        if key in ops.MOVES:
            return self._followed(node, source, lambda value: self.evaluate(node, value))
        if self.operands[node] or key in ops.ELEMENTWISE:
            return self._followed(node, source, lambda value: value(source).broadcast_to(after))
        if source is not self.tensors(node)[0] or before[:2] != after[:2]:
            return None
        if key in ops.REDUCE:
            dims = argument(node, 1, "dim")
            over = [dims] if isinstance(dims, int) else dims
            whole = over and all(isinstance(d, int) and d % len(before) >= 2 for d in over)
            return torch.arange(after[1]) if whole else None
        if key in ops.SPATIAL and len(before) != 4:
            return None
        known = ops.PASSING | ops.ACTIVATIONS | ops.SPATIAL
        return torch.arange(after[1]) if key in known or key in NORMS else None

    def _followed(self, node: fx.Node, source: fx.Node, run: Callable) -> Tensor | None:
        """Give numbers to an input's features, run an operation, and find them in its output.

        Other inputs are nan. The second image has the numbers of the first with a minus sign, to
        find operations that mix images. Their origin is not known: None.
        """
        numbers = torch.arange(1.0, self.shape(source)[1] + 1)
        try:
            out = run(self._spread({source: torch.stack([numbers, -numbers])}))
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None
        if len(out) != 2 or not out[0].nan_to_num().equal(-out[1].nan_to_num()):
            return None
        found = out[0].flatten(1) if out.dim() > 2 else out[0][:, None]
        numbers = found.amax(1)
        alike = (found == numbers[:, None]) | (found == 0)  # 0: a margin
        if not (alike.all(1) | found.nan_to_num().eq(0).all(1)).all():
            return None
        return numbers.nan_to_num().long() - 1

    def constants(self, node: fx.Node, known: Mapping[fx.Node, Tensor]) -> Tensor:
        """Compute a node's output features from input features that are the same at every pixel.

        Args:
            node: An operation on single values or on the pixels of each feature, or one that moves
                features.
            known: By input, the values of its features (features,), nan where they vary.

        Returns:
            The values (features,) of the output's features, nan where they vary or are not finite.
        """
        if self.key(node) in ops.PASSING:
            return next(iter(known.values()))
        alone = self.key(node) in ops.ELEMENTWISE
        value = self._spread({source: x[None] for source, x in known.items()}, pixels=not alone)
        out = self.evaluate(node, value)
        if self.key(node) in ops.MULTIPLY:
            for factor in map(value, known):
                out = torch.where(factor == 0, 0, out)  # zero times anything is zero
        low, high = out.transpose(0, 1).flatten(1).aminmax(dim=1)
        uniform = torch.isclose(low, high, rtol=1e-5, atol=0) & high.isfinite()
        return torch.where(uniform, high, torch.nan).expand(self.shape(node)[1])

    def _spread(
        self, known: Mapping[fx.Node, Tensor], pixels: bool = True
    ) -> Callable[[fx.Node], Any]:
        """Return a function from a node to a tensor of its features' values, nan if not known.

        Args:
            known: By node, the values of its features (images or 1, features).
            pixels: Give each tensor its full size, instead of a single pixel.
        """
        like = next(iter(known.values()))

        def value(node: fx.Node) -> object:
            if node in self.plain:
                return self.values[node]
            shape = self.shape(node)
            if node not in known:
                return torch.full(shape if pixels else (), torch.nan).to(like)
            column = known[node][(...,) + (None,) * (len(shape) - 2)]
            return column.expand(shape).clone() if pixels else column.clone()

        return value


def _layer(kind: Any, module: Any, x: Any) -> Tensor:
    """Return a tensor of the size of a layer's output for x, from the sizes that it states."""
    expected = getattr(module, "in_features", getattr(module, "num_features", None))
    if expected not in (None, x.shape[-1 if kind is nn.Linear else 1]):
        raise ValueError("the images are not of this size")
    if kind is nn.Linear:
        return x.new_ones(*x.shape[:-1], module.out_features)
    if kind not in (*CONVOLUTIONS, *TRANSPOSED):
        return torch.ones_like(x)
    convolve = getattr(F, kind.__name__.lower().replace("transpose", "_transpose"))
    options = {name: getattr(module, name) for name in ("stride", "padding", "dilation")}
    if kind in TRANSPOSED:
        options["output_padding"] = module.output_padding
    pixels = convolve(x[:, :1], x.new_ones(1, 1, *module.kernel_size), **options).shape[2:]
    return x.new_ones(len(x), module.out_channels, *pixels)
