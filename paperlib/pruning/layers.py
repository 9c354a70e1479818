"""The convolutions of a network: those that can be pruned, and the parameters of each filter."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import is_lazy
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from paperlib.pruning import operations as ops
from paperlib.pruning.features import Network
from paperlib.pruning.graph import has_own_forward, layer_type
from paperlib.pruning.masks import multiply_by_mask
from paperlib.pruning.operations import CONVOLUTIONS, TRANSPOSED
from paperlib.pruning.zeros import Entries, OnShortcut, Refused, Trail


class PruningError(ValueError):
    """A request that cannot be carried out; the message names the value and the valid ones."""


@dataclass(frozen=True)
class PrunableLayer:
    """A convolution, and the parameters and masks that are zero with each of its filters.

    Attributes:
        name: The convolution's name in its network.
        conv: The convolution itself.
        norm: The norm of its output, before any activation; None if there is not exactly one.
        output: The module whose output is the layer's output before its activation: the sum whose
            branch the layer ends, else the norm, else the convolution. None if the sum is not a
            `ResidualSum`.
        entries: By name of module, further parameters that are zero with a filter.
        masks: By name of module, the masks of the residual sums whose branch the layer ends.
        uses: How many times a forward pass calls the convolution.
        passed_over: Why it does not count as prunable (grouped, or on a shortcut), or None.
        refusal: Why its weights cannot be set to zero, or None.
        leak: Why its filters would not be zero where they are used, or None.
    """

    name: str
    conv: Any
    norm: Any = None
    output: nn.Module | None = None
    entries: Mapping[str, Entries] = field(default_factory=dict)
    masks: Mapping[str, Entries] = field(default_factory=dict)
    uses: int = 1
    passed_over: str | None = None
    refusal: str | None = None
    leak: str | None = None

    @property
    def filters(self) -> int:
        """The number of filters of the convolution."""
        return self.conv.out_channels

    def problem(self, norm: bool) -> str | None:
        """Return why the layer cannot be pruned, or None.

        Args:
            norm: As for `FilterPruner`.
        """
        return self.passed_over or self.refusal or (self.leak if norm else None)

    def zeroed(self, norm: bool) -> dict[str, Entries]:
        """Return the parameters that are zero with a filter, by name of module.

        Args:
            norm: Include the convolution's bias, and the `entries` of later modules.
        """
        of_conv = ("weight", "bias") if norm and self.conv.bias is not None else ("weight",)
        return {self.name: Entries(self.conv, of_conv, tuple(range(self.filters)))} | (
            dict(self.entries) if norm else {}
        )


def prunable_layers(model: nn.Module, norm: bool = True) -> dict[str, PrunableLayer]:
    """Return a network's prunable convolutions by name, in forward order.

    Three kinds are left out: grouped convolutions, convolutions on the shortcut of a residual sum,
    and those that `FilterPruner` would refuse.

    Args:
        model: The network.
        norm: As for `FilterPruner`.

    Raises:
        PruningError: torch.fx cannot follow the network's forward pass, or the network is compiled.
    """
    return {name: layer for name, layer in survey(model).items() if not layer.problem(norm)}


def survey(model: nn.Module) -> dict[str, PrunableLayer]:
    """Return all convolutions of a network by name, in forward order, prunable or not.

    The network is followed in training and in evaluation mode, which may differ.

    Raises:
        PruningError: torch.fx cannot follow the network's forward pass, or the network is compiled.
    """
    check_network(model)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise PruningError(f"cannot follow a {type(model).__name__}: pass model.module instead")
    try:
        networks = [Network(model, training) for training in (True, False)]
    except Exception as error:
        raise PruningError(
            f"cannot follow the forward pass of {type(model).__name__} with torch.fx: {error}"
        ) from error
    if str(networks[0].graph) == str(networks[1].graph):
        del networks[1]
    owners = parameter_owners(model)
    names = dict.fromkeys(name for network in networks for name in _convolutions(network))
    return {name: _layer(networks, name, owners) for name in names}


def check_network(model: nn.Module) -> None:
    """Raise PruningError if a network is no nn.Module, or is compiled and so notices no pruning."""
    if not isinstance(model, nn.Module):
        raise PruningError(f"a network must be an nn.Module, got {model!r}")
    for name, module in model.named_modules():
        compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None)
        if compiled or isinstance(module, torch.jit.ScriptModule):
            where = f"{name!r}" if name else type(model).__name__
            raise PruningError(
                f"{where} is compiled: make the pruner with the network itself, and compile after"
            )


def check_values(model: nn.Module) -> None:
    """Raise PruningError if a parameter is on the meta device, where it has no value."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise PruningError(f"{name!r} has no value: it is on the meta device")


def parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """Return all names of each parameter, by the address of its memory."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names = owners.setdefault(_address(parameter), [])
                names.append(f"{path}.{name}" if path else name)
    return owners


def check_order(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise PruningError unless each name is known, appears once, and is in the known order."""
    if list(names) != [name for name in known if name in set(names)]:
        order = [name for name in known if name in set(names)] or list(known)
        raise PruningError(f"layers must be named once each, in order: {order}, not {list(names)}")


def weight_refusal(
    module: nn.Module, base: type, owners: Mapping[int, list[str]], *names: str
) -> str | None:
    """Return why a layer's parameters cannot be set to zero, or None.

    Args:
        module: The layer.
        base: The class of torch whose forward pass the layer should have.
        owners: The result of `parameter_owners`.
        names: The names of the parameters in the layer.
    """
    kind = type(module).__name__
    if has_own_forward(module, base):
        return f"{kind} has a forward pass of its own, which may use its weights in any way"
    first = module._parameters.get(names[0])
    if first is not None and is_lazy(first):
        return f"{kind} has no weights yet: run it on a batch first"
    for name in names:
        parameter = module._parameters.get(name)
        if parameter is None:
            return (
                f"its {name} is computed (weight_norm, spectral_norm, prune or another "
                "parametrization): make that permanent, or remove it first"
            )
        shared = owners[_address(parameter)]
        if len(shared) > 1:
            return f"its {name} is shared: {' and '.join(shared)} are the same parameter"
        if not parameter.is_meta and not parameter.isfinite().all():
            return f"its {name} is not finite"
    return None


def _address(parameter: Tensor) -> int:
    return id(parameter) if is_lazy(parameter) or parameter.is_meta else parameter.data_ptr()


def _convolutions(network: Network) -> Iterator[str]:
    """Yield the names of modules that convolve, or call a function that does, in forward order."""
    for node in network.graph.nodes:
        scopes = network.scopes(node)
        names = [name for name in scopes if _convolves(network.modules[name])]
        if not names and network.key(node) in ops.FUNCTIONAL_CONVOLUTIONS:
            names = scopes[-1:] or [node.name]
        yield from names


def _convolves(module: nn.Module | None) -> bool:
    quantised = "quantized" in type(module).__module__ and "Conv" in type(module).__name__
    return quantised or isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))


def _layer(
    networks: Sequence[Network], name: str, owners: Mapping[int, list[str]]
) -> PrunableLayer:
    conv = networks[0].modules.get(name)
    if not isinstance(conv, nn.Conv2d):
        kind = type(conv).__name__ if _convolves(conv) else "a convolution by a function"
        return PrunableLayer(name, conv, refusal=f"it is {kind}, and not an nn.Conv2d")
    if conv.groups != 1:
        why = f"it is a grouped convolution (groups={conv.groups})"
        return PrunableLayer(name, conv, passed_over=why)
    names = ("weight",) if conv.bias is None else ("weight", "bias")
    refusal = weight_refusal(conv, nn.Conv2d, owners, *names) or _read_directly(networks, name)
    if refusal is not None:
        return PrunableLayer(name, conv, refusal=refusal)
    try:
        trail = Trail(networks, name)
    except OnShortcut as error:
        return PrunableLayer(name, conv, passed_over=str(error))
    except Refused as error:
        return PrunableLayer(name, conv, output=conv, leak=str(error))
    norm = next(iter(trail.norms)) if len(trail.norms) == 1 else None
    output = next(iter(trail.sums)) if len(trail.sums) == 1 else norm or conv
    leak = _leak(networks, trail, owners)
    return PrunableLayer(
        name, conv, norm, output, trail.entries, trail.masks, trail.uses, leak=leak
    )


def _leak(networks: Sequence[Network], trail: Trail, owners: Mapping[int, list[str]]) -> str | None:
    """Return why an entry cannot be zero with its filter, or which hook may change it, or None."""
    for name, entries in trail.entries.items():
        base = layer_type(entries.module)
        why = weight_refusal(entries.module, base, owners, *entries.parameters)
        if why := why or _read_directly(networks, name):
            return f"of {name!r}, which is zero with it, {why}"
    modules = networks[0].modules
    found = [(repr(name), modules[name]._forward_hooks) for name in trail.passed]
    found += [(repr(name), modules[name]._forward_pre_hooks) for name in trail.readers]
    found += [("every module", _global_forward_hooks), ("every module", _global_forward_pre_hooks)]
    for where, hooks in found:
        if not all(map(_changes_nothing, hooks.values())):
            return f"{where} has a forward hook, which may change a pruned filter: remove the hook"
    return None


def _changes_nothing(hook: Any) -> bool:
    """Return whether a forward hook leaves the zeros of pruned filters; those of torch do."""
    of_torch = getattr(hook, "__module__", "").startswith("torch.nn.")
    return of_torch or hook is multiply_by_mask or hasattr(hook, "watches")


def _read_directly(networks: Sequence[Network], name: str) -> str | None:
    """Return which parameter of a module the forward pass reads without the module, or None."""
    for network in networks:
        for node in network.graph.nodes:
            if node.op == "get_attr" and node.target.rpartition(".")[0] == name:
                return f"the forward pass also reads {node.target!r} by itself"
    return None
