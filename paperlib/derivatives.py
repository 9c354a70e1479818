"""Whether the derivatives that autograd gives for a network are those of its loss.

They are not where a custom autograd function has a wrong backward, or none that can be
differentiated again, and where a part of the network runs without gradients.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from paperlib.loss import Loss, T

log = logging.getLogger(__name__)

PROBED = 2  # images that derivatives are checked on
STEPS = (1e-8, 1e-9, 1e-10, 1e-3)  # relative steps of finite differences; the last is for float32
AGREEMENT = 1e-3  # largest relative difference between two ways to a derivative
CONVERSIONS = (Tensor.float, Tensor.to, Tensor.type)


def check_derivatives(loss: Loss, order: int) -> None:
    """Compare autograd's derivatives of the loss with finite differences, on two images.

    This is done in float64: in float32, differences are too coarse beside the kinks of ReLU. For a
    network that cannot compute in float64 a warning is logged. The directions are random relative
    changes of the weights, so that pruned weights stay zero.

    Args:
        loss: The loss.
        order: 1 checks the gradient; 2 checks the Hessian, too.

    Raises:
        ValueError: The network cannot be differentiated, or autograd's derivatives are not those
            of the loss.
    """
    generator = torch.Generator().manual_seed(0)

    def direction(at: Loss) -> Tensor:
        steps = []
        for name, w in at.weights.items():
            step = w * torch.randn(w.shape, generator=generator, device="cpu").to(w)
            steps.append(step.masked_fill(loss.held[name], 0) if name in loss.held else step)
        return torch.cat([step.flatten() for step in steps])

    wide, right = probe(loss), None
    with loss.measuring():
        if isinstance(wide, _Wide):
            # A kink within the step spoils a comparison, but not every time.
            with suppress(ValueError):
                right = any(_match(wide, direction(wide), step, order) for step in STEPS)
        if right is None:
            few = _few(loss)
            _derivatives(few, direction(few), 0, order)
            log.warning("%s does not compute in float64: its derivatives are unchecked", loss.name)
    if right is False:
        raise ValueError(
            f"the {'gradient' if order == 1 else 'derivatives'} that autograd gives for "
            f"{loss.name} disagree with finite differences of its loss: a custom autograd function "
            "may have a wrong backward, or a part may run without gradients (torch.no_grad, "
            "detach). Parameters that are no coordinates belong in `held`"
        )


def probe(loss: Loss) -> Loss:
    """Return the loss of the first images alone, in float64 where the network can do that."""
    few = _few(loss)
    try:
        tensors = {
            name: {n: _wide(t) for n, t in getattr(loss, name).items()}
            for name in ("weights", "buffers")
        }
        wide = _Wide(**vars(few) | tensors | {"images": few.images.double()})
        wide.evaluate(wide.weights)
    except Exception:  # of any kind: the network has a kernel for float32 alone, say
        return few
    return wide


def _few(loss: Loss) -> Loss:
    return replace(loss, images=loss.images[:PROBED], labels=loss.labels[:PROBED])


class _Wide(Loss):
    """A loss whose network computes in float64, also where it makes or asks for float32."""

    def within(self, weights: dict[str, Tensor], function: Callable[[], T]) -> T:
        with _Float64():
            return super().within(weights, function)


class _Float64(TorchFunctionMode):
    """Has functions take and give float64 in place of float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args = _wide(args)
        out = function(*args, **{name: _wide(value) for name, value in (kwargs or {}).items()})
        rounded = isinstance(out, Tensor) and out.dtype == torch.float32
        if function in CONVERSIONS and rounded and args[0].is_floating_point():
            return args[0].to(out.device)
        return _wide(out)


def _wide(value: object) -> object:
    """Return tensors of float32, alone or in a list or tuple, in float64; others as they are."""
    if type(value) in (list, tuple):
        return type(value)(map(_wide, value))
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def _match(loss: Loss, direction: Tensor, step: float, order: int) -> bool:
    """Return whether derivatives along a direction are those of central differences."""
    _, gradient, curvature = _derivatives(loss, direction, 0, order)
    up, gradient_up, _ = _derivatives(loss, direction, step, 1)
    down, gradient_down, _ = _derivatives(loss, direction, -step, 1)
    slope, terms = gradient @ direction, (gradient * direction).norm()
    right = _agree((up - down) / (2 * step), slope, terms)
    if order == 1 or not right:
        return right
    return _agree((gradient_up - gradient_down) / (2 * step), curvature, 1e-4 * gradient.norm())


def _agree(a: Tensor, b: Tensor, terms: Tensor) -> bool:
    """Return whether a = b, but for a small part of their size or that of the terms they sum."""
    return bool((a - b).norm() <= AGREEMENT * torch.stack([a.norm(), b.norm(), terms]).max())


def _derivatives(
    loss: Loss, direction: Tensor, step: float, order: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the total loss at w + step * direction, its gradient (P,) and H * direction (P,).

    The last is zero where order is 1.
    """
    moves = loss.split(step * direction)
    weights = {
        n: (w + move).requires_grad_()
        for (n, w), move in zip(loss.weights.items(), moves, strict=True)
    }
    leaves = list(weights.values())

    def compute() -> tuple[Tensor, Tensor, Tensor]:
        value = loss.total(weights, loss.images, loss.labels)
        gradients = torch.autograd.grad(
            value, leaves, create_graph=order == 2, materialize_grads=True
        )
        gradient = torch.cat([g.flatten() for g in gradients])
        curvature = torch.zeros_like(gradient)
        if order == 2 and gradient.requires_grad:
            products = torch.autograd.grad(gradient @ direction, leaves, materialize_grads=True)
            curvature = torch.cat([p.flatten() for p in products])
        return value.detach(), gradient.detach(), curvature

    try:
        return loss.within(weights, compute)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        often = "once" if order == 1 else "twice"
        raise ValueError(f"{loss.name} cannot be differentiated {often}: {error}") from error
