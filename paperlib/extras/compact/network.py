"""The compact network itself: a copy that is cut, and checked against the original."""

from collections.abc import Iterator, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from paperlib import devices
from paperlib.extras.compact.channels import CompactError, Following
from paperlib.extras.compact.cut import cut
from paperlib.pruning import FilterPruner, WeightPruner
from paperlib.pruning.graph import layer_type
from paperlib.pruning.layers import parameter_owners, weight_refusal
from paperlib.pruning.masks import mask_of, multiply_by_mask
from paperlib.pruning.operations import CONVOLUTIONS, NORMS

TOLERANCE = 1000  # in floating-point resolutions (eps) of the output's largest value


def compact(
    model: nn.Module,
    *pruners: FilterPruner | WeightPruner,
    example: Sequence[int] | Tensor = (2, 3, 32, 32),
) -> nn.Module:
    """Return a copy of a pruned network without superfluous channels and neurons.

    In evaluation mode, for images of the example's size, the copy's outputs are the same but for
    rounding. The copy can be trained further, so both modes must run the same layers. A channel or
    neuron is cut if it is zero, or has no outgoing weights, or is a constant that can be folded
    into the biases of its readers. The channels of a residual stage are cut together or not at all.

    A channel that cannot be cut exactly stays, with its zeros and masks. Examples are a constant
    other than zero that a padded convolution reads, as with `FilterPruner(norm=False)`, and the
    channels of a grouped convolution that is not depthwise. Every layer keeps at least one channel.
    Forward hooks are not copied.

    Args:
        model: The network. Only its zeros decide about the cuts.
        pruners: Pruners of this network. Everything that they hold at zero must be zero.
        example: An input, or the shape of one, on which both networks are run and compared.

    Raises:
        CompactError: The network's graph is not understood, a parameter is not zero although a
            pruner holds it there, or the network does not run on the example, or the outputs would
            differ. The message names the module, if there is one.
    """
    _check_parameters(model)
    _check_held(model, pruners)
    small = deepcopy(model).eval()
    inputs = example_input(small, example)
    expected = _outputs(small, inputs, type(model).__name__)
    for module in small.modules():
        module._forward_pre_hooks.clear()
        for key in [k for k, h in module._forward_hooks.items() if h is not multiply_by_mask]:
            del module._forward_hooks[key]
    cut(Following(small, inputs))
    _check_same(expected, _outputs(small, inputs, f"the compact {type(model).__name__}"))
    for module, original in zip(small.modules(), model.modules(), strict=True):
        module.training = original.training
    return small


def example_input(model: nn.Module, example: Sequence[int] | Tensor) -> Tensor:
    """Return an input for a network: `example`, or random numbers of that shape."""
    parameter = next(model.parameters(), torch.empty(0))
    if not isinstance(example, Tensor):
        example = torch.randn(tuple(example), generator=torch.Generator().manual_seed(0))
    return example.to(parameter.device, parameter.dtype)


def _check_parameters(model: nn.Module) -> None:
    owners = parameter_owners(model)
    for name, module in model.named_modules():
        kind = layer_type(module)
        if kind in (*CONVOLUTIONS, *NORMS, nn.Linear):
            names = [key for key in ("weight", "bias") if getattr(module, key) is not None]
            if names and (why := weight_refusal(module, kind, owners, *names)):
                raise CompactError(f"{name!r} cannot be cut: {why}")


def _check_held(model: nn.Module, pruners: Sequence[FilterPruner | WeightPruner]) -> None:
    parameters = dict(model.named_parameters())
    for pruner in pruners:
        for name, gone in pruner.held().items():
            parameter = parameters.get(name)
            if parameter is None or parameter.shape != gone.shape:
                raise CompactError(f"the pruner is of another network: it holds {name!r} at zero")
            if parameter[gone].any():
                raise CompactError(
                    f"{name!r} is not zero where its pruner holds it: call hold() first, and with "
                    "the network of this pruner"
                )
        for module, indices in getattr(pruner, "masked", ()):
            if (mask := mask_of(module)) is None or mask[indices].any():
                raise CompactError("the mask of a residual sum is not the pruner's: call hold()")


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Tensor, what: str) -> object:
    try:
        with devices.full_float32():
            return model(inputs)
    except Exception as error:
        raise CompactError(
            f"{what} does not run on an input of shape {tuple(inputs.shape)}; another can be given "
            f"as example: {error}"
        ) from error


def _check_same(expected: object, actual: object) -> None:
    for a, b in zip(_tensors(expected), _tensors(actual), strict=True):
        if a.is_floating_point():
            error, scale = (a - b).abs().max(), a.abs().max()
            # The negation refuses outputs that are not finite.
            if not error <= TOLERANCE * torch.finfo(a.dtype).eps * scale:
                raise CompactError(
                    "the compact network would not be the same network: its outputs differ by "
                    f"{error:.2g} of {scale:.2g}"
                )


def _tensors(output: object) -> Iterator[Tensor]:
    """Yield the tensors in a network's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list | dict):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part)
