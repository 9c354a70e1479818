"""A network's forward pass as a graph (torch.fx), and the types of its operations."""

import copy
import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import is_lazy

from paperlib.models import PadChannels, ResidualSum
from paperlib.pruning import operations as ops
from paperlib.pruning.operations import CONVOLUTIONS, NORMS, TRANSPOSED

_BASES = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear, *NORMS)


def layer_type(module: nn.Module) -> type:
    """Return the torch layer whose forward pass a module has, or else the module's class.

    A subclass of a layer counts as that layer if it keeps the layer's forward pass. A module whose
    forward pass was replaced is an `object`, of which nothing is known.
    """
    if "forward" in vars(module):
        return object
    for base in _BASES:
        if isinstance(module, base) and not has_own_forward(module, base):
            return base
    return type(module)


def has_own_forward(module: nn.Module, base: type) -> bool:
    """Return whether a module replaces the forward pass of `base`, the layer it derives from."""
    same = all(
        getattr(type(module), name, None) is getattr(base, name, None)
        for name in ("forward", "_conv_forward")
    )
    return not same or "forward" in vars(module)


class _Proxy(fx.Proxy):
    """A proxy of torch.fx that tells `x += y`, which writes into x, from `x + y`."""

    def expand_as(self, other: fx.Proxy) -> fx.Proxy:
        """Expand to the size of another tensor, whose values have no effect."""
        return self.expand(other.shape)


def _in_place(function: Callable) -> Callable:
    return lambda x, y: x.tracer.create_proxy("call_function", function, (x, y), {})


for _name in ("iadd", "isub", "imul"):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Trace a network down to torch's layers, their subclasses, and this package's layers.

    The value that any other module returns gets a node of its own, `operations.returned`. Code that
    calls the module uses this node. Other code, such as the module's own, uses the node before it.

    Attributes:
        returns: By name of module, the node that each of its calls returns, None if a call does
            not return a single tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.returns: dict[str, list[fx.Node | None]] = {}

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        # A norm's forward pass branches on its input, so all subclasses of norms are leaves.
        known = isinstance(module, (ResidualSum, PadChannels, *NORMS))
        return known or layer_type(module) in _BASES or super().is_leaf_module(module, name)

    def create_args_for_root(
        self, root_fn: Callable, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable, list]:
        # As in a call with images: arguments that have a default keep it.
        _, *parameters = inspect.signature(root_fn).parameters.values()
        several = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        needed = [p for p in parameters if p.default is p.empty and p.kind not in several]
        given = {
            p: self.create_proxy("placeholder", p.name, (), {}) for p in needed or parameters[:1]
        }
        named = {p.name: x for p, x in given.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
        images = [x for p, x in given.items() if p.name not in named]
        return partial(root_fn, **named), [self.root, *images]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(
        self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict
    ) -> object:
        name, out = self.path_of_module(module), super().call_module(module, forward, args, kwargs)
        if isinstance(out, fx.Proxy) and not self.is_leaf_module(module, name):
            out = self.create_proxy("call_function", ops.returned, (out,), {})
        node = out.node if isinstance(out, fx.Proxy) else None
        self.returns.setdefault(name, []).append(node)
        return out


class Traced:
    """A network's forward pass in one mode.

    A copy of the network is traced. It and torch's CPU generator stay as they were.

    Attributes:
        graph: The operations, in the order of the forward pass.
        attributes: By name, the tensors that the graph gets from attributes of the network itself.
        modules: The modules, by every name that they have.
        returns: By name of module, the node that each of its calls returns, None if a call does
            not return a single tensor.

    Raises:
        Exception: The tracing fails, with an error of any type.
    """

    def __init__(self, model: nn.Module, training: bool) -> None:
        tracer = _Tracer()
        try:
            # The code may change what it traces: attributes, lists, buffers.
            traced = copy.deepcopy(model, _detached(model))
            with in_mode(traced, training), torch.random.fork_rng(devices=[]):
                self.graph = tracer.trace(traced)
                self.attributes = {n: x for n, x in vars(traced).items() if isinstance(x, Tensor)}
            self.returns = tracer.returns
        finally:
            vars(tracer).clear()  # the tracer is in a reference cycle and would keep the network
        self.modules: dict[Any, Any] = dict(model.named_modules(remove_duplicate=False))

    def key(self, node: fx.Node) -> Any:
        """Return a node's operation: a type of layer, a function, a method's name, or its `op`."""
        if node.op == "call_module":
            return layer_type(self.modules[node.target])
        if getattr(node.target, "__name__", "") == "stochastic_depth":  # torchvision's
            return "stochastic_depth"
        return node.target if node.op in ("call_function", "call_method") else node.op

    def module(self, node: fx.Node) -> Any:
        """Return the module that a node calls, or None."""
        return self.modules[node.target] if node.op == "call_module" else None

    def name(self, node: fx.Node) -> str:
        """Return the name of the module, parameter or method that a node uses."""
        return str(node.target)

    def calls(self, name: str) -> list[fx.Node]:
        """Return the nodes that call a module, under any of its names, in order."""
        module = self.modules.get(name)
        return [node for node in self.graph.nodes if module and self.module(node) is module]

    def scopes(self, node: fx.Node) -> list[str]:
        """Return the names of the modules whose calls a node is part of, outermost first."""
        return [name for name, _ in node.meta.get("nn_module_stack", {}).values()]

    def evaluate(self, node: fx.Node, value: Callable[[fx.Node], object]) -> Any:
        """Compute a node's output from the values of its inputs, without hooks."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)  # type: ignore[arg-type, misc]
        target: Any = node.target
        if node.op == "call_module":
            return self.modules[target].forward(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    def describe(self, node: fx.Node) -> str:
        """Name a node as its network's author would."""
        if node.op == "call_module":
            return f"{node.target!r} ({type(self.modules[node.target]).__name__})"
        if node.op == "output":
            return "the network's output"
        *_, scope = ["", *self.scopes(node)]
        name = getattr(node.target, "__name__", node.target)
        return f"{name!r} in {scope!r}" if scope else repr(name)


def argument(node: fx.Node, position: int, name: str, default: object = None) -> Any:
    """Return an argument of a node, by position or by name."""
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else default)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put all modules of a network into training or evaluation mode, and back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = training
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _detached(model: nn.Module) -> dict[int, Tensor]:
    """Return, by id, what stands for tensors that deepcopy refuses: computed, or without values."""
    values = (value for module in model.modules() for value in vars(module).values())
    computed = [x for x in values if isinstance(x, Tensor) and not x.is_leaf]
    lazy = {id(x): x for x in (*model.parameters(), *model.buffers()) if is_lazy(x)}
    return lazy | {id(x): x.detach().clone() for x in computed}
