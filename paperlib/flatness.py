"""Flatness: the Hessian's leading eigenpairs, the gradients' covariance, the loss around a minimum.

Definitions of arXiv 1906.03728, section 3 and appendix E. Everything is of the mean cross-entropy
in evaluation mode; a parameter that pruning holds at zero is no coordinate of it. These arguments
recur:

- `model`: a network of float images that returns logits (N, classes), alone or as `logits` of an
  object or dict. Its mode, weights, gradients and buffers are left as they were.
- `images`, `labels`: (N, ...) floats, normalised, and (N,) integers; moved to the model's device.
- `held`: parameter name -> bool tensor of its shape, True where pruning holds it at zero.
- `chunk`: images that go through the network in one batch; by default 64 on the CPU, 512 elsewhere.

P counts all parameters in the order of `model.named_parameters()`: those that are held, and those
that do not require gradients, too. Weights in bfloat16 or float16 are measured as float32. Bad
input, and networks whose measures would be wrong, raise ValueError before any long work (`loss`).
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from paperlib.extras.fast import convolutions
from paperlib.lanczos import leading_eigenpairs
from paperlib.loss import PROBED, Held, Loss, Weights
from paperlib.measures import delta_w as delta_w
from paperlib.measures import tic as tic

log = logging.getLogger(__name__)

GRAPHS_GIB = 4.0  # memory for gradients' graphs that are kept from product to product
VECTORISED = 32  # images whose gradients are computed at once, at most
GRADIENTS = {"cpu": 2**23, "other": 2**30}  # numbers of all their gradients, at most


# The Hessian


def hessian_spectrum(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    k: int = 100,
    held: Held | None = None,
    *,
    tol: float = 1e-4,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the Hessian's k eigenvalues of largest magnitude, and their eigenvectors.

    Args:
        model: See the module's docstring, like the next four.
        images: (N, ...) floats.
        labels: (N,) integers.
        held: What pruning holds at zero.
        chunk: Images in one batch.
        k: How many eigenpairs to compute.
        tol: Largest |Hv - av| over the pairs, relative to the largest |a|. An eigenvalue's error
            is of the order of its square over the gap to the next.

    Returns:
        Eigenvalues (k,) of either sign, by magnitude, largest first, repeated ones as often as they
        occur; eigenvectors (k, P), unit rows, zero at held coordinates. The same input gives the
        same result.

    Raises:
        ValueError: Bad input, or k is not within 1 and the number of free parameters.
        lanczos.ConvergenceError: 20 k + 200 Hessian-vector products are not enough.
    """
    loss = Loss(model, images, labels, held, chunk)
    most = len(loss.free)
    if not (isinstance(k, Integral) and 1 <= k <= most):
        raise ValueError(f"k must be an integer within 1 and {most} free parameters, got {k!r}")
    if not (isinstance(tol, Real) and tol > 0):
        raise ValueError(f"tol must be a positive number, got {tol!r}")
    product, like = hessian_operator(loss), loss.like
    values, vectors, _ = leading_eigenpairs(
        product, most, k, tol=tol, dtype=like.dtype, device=like.device
    )
    return values, loss.filled(vectors)


def hessian_operator(loss: Loss) -> Callable[[Tensor], Tensor]:
    """Make the function v (F,) -> Hv (F,) over the F free coordinates of a loss.

    Hv is the gradient of gradient-dot-v by a second reverse pass (Pearlmutter, 1994). The graph of
    the gradient does not depend on v, so it is built once and kept, for as many chunks as fit into
    `GRAPHS_GIB`. For the others it is built in every product, which costs about half as much again.
    On a CPU convolutions of few pixels are products of matrices (`convolutions.quick`). A product
    does not wait for the device.
    """
    loss.check_derivatives(order=2)
    pieces = [(_contiguous(x), y) for x, y in loss.pieces]
    weights = {n: _contiguous(w).detach().requires_grad_() for n, w in loss.weights.items()}
    leaves = list(weights.values())

    def gradient_graph(x: Tensor, y: Tensor) -> Gradients:
        with loss.measuring(), convolutions.quick(loss.model):
            return _gradients(loss, weights, x, y, over=len(loss.labels), graph=True)

    kept: list[Gradients | None] = []
    budget = GRAPHS_GIB * 2**30
    for x, y in pieces:
        with _saved_bytes() as saved:
            graph = gradient_graph(x, y) if budget > 0 else None
        budget -= sum(saved.values())
        kept.append(graph if budget > 0 else None)

    def matvec(v: Tensor) -> Tensor:
        full = loss.filled(v)
        out = torch.zeros_like(full)
        for graph, (x, y) in zip(kept, pieces, strict=True):
            gradients = gradient_graph(x, y) if graph is None else graph
            pairs = zip(gradients, loss.split(full), strict=True)
            curved = [(g, by) for g, by in pairs if g.requires_grad]
            product = partial(
                torch.autograd.grad,
                [g for g, _ in curved],
                leaves,
                [by for _, by in curved],
                retain_graph=graph is not None,
                materialize_grads=True,
            )
            with loss.measuring():
                out += torch.cat([p.detach().flatten() for p in loss.within(weights, product)])
        return loss.picked(out)

    return matvec


Gradients = tuple[Tensor, ...]  # a tensor a parameter


def _gradients(
    loss: Loss, weights: Weights, x: Tensor, y: Tensor, over: int = 1, graph: bool = False
) -> Gradients:
    """Compute the gradient of some images' total loss, divided by `over`.

    With `graph` it can be differentiated again. The weights require gradients.
    """

    def compute() -> Gradients:
        total, leaves = loss.total(weights, x, y) / over, list(weights.values())
        return torch.autograd.grad(total, leaves, create_graph=graph, materialize_grads=True)

    return loss.within(weights, compute)


def _contiguous(tensor: Tensor) -> Tensor:
    """Return images or weights in the memory format in which a CPU is quicker here."""
    return tensor.contiguous() if tensor.device.type == "cpu" and tensor.dim() == 4 else tensor


@contextmanager
def _saved_bytes() -> Iterator[dict[int, int]]:
    """Count the bytes of each block of memory that autograd keeps, by its address."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


# The gradients' covariance


def gradient_covariance_trace(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    held: Held | None = None,
    centered: bool = False,
    *,
    chunk: int | None = None,
) -> float:
    """Compute Tr(C), the mean over images of the squared norm of the single-image gradient.

    Args:
        model: See the module's docstring, like the next four.
        images: (N, ...) floats.
        labels: (N,) integers.
        held: What pruning holds at zero.
        chunk: Images in one batch.
        centered: Whether to subtract the squared norm of the mean gradient, which gives the trace
            of the covariance proper (over N). The paper does not.
    """
    loss = Loss(model, images, labels, held, chunk)
    loss.check_derivatives(order=1)
    total = 0.0
    weights = {name: w.detach().requires_grad_() for name, w in loss.weights.items()}
    with loss.measuring():
        norms = _squared_norms(loss, weights)
        for x, y in loss.pieces:
            total += float(norms(x, y).sum())
        if centered:
            whole = [torch.zeros_like(w) for w in loss.weights.values()]
            for x, y in loss.pieces:
                whole = [a + b for a, b in zip(whole, _gradients(loss, weights, x, y), strict=True)]
            total -= float(_squared_norm(loss, whole)) / len(images)
    if not math.isfinite(total):
        raise ValueError(f"the gradients' covariance is not finite: {total}")
    return total / len(images)


Norms = Callable[[Tensor, Tensor], Tensor]


def _squared_norms(loss: Loss, weights: Weights) -> Norms:
    """Choose how to compute single images' squared gradient norms (N,).

    All at once, unless the network does not allow that or gives other norms then, or their
    gradients take much memory: then one by one is quicker.
    """

    def one_by_one(images: Tensor, labels: Tensor) -> Tensor:
        single = zip(images.split(1), labels.split(1), strict=True)
        return torch.stack(
            [_squared_norm(loss, _gradients(loss, weights, x, y)) for x, y in single]
        )

    limit = GRADIENTS["cpu" if loss.images.device.type == "cpu" else "other"]
    at_once = min(VECTORISED, loss.chunk, limit // loss.size)
    if at_once < 2:
        return one_by_one

    def norm(image: Tensor, label: Tensor) -> Tensor:
        gradients = grad(loss.total)(loss.weights, image[None], label[None])
        return _squared_norm(loss, gradients.values())

    together = vmap(norm, chunk_size=at_once)
    few = loss.images[:PROBED], loss.labels[:PROBED]
    expected = one_by_one(*few)
    try:
        if torch.allclose(together(*few), expected, rtol=1e-3):
            return together
        reason = "other gradients"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind: vmap runs the network's own code
        reason = str(error)
    log.warning("Tr(C) takes an image at a time, because vmap gives: %s", reason)
    return one_by_one


def _squared_norm(loss: Loss, gradients: Iterable[Tensor]) -> Tensor:
    """Return the squared norm of a gradient over the free coordinates."""
    norm = torch.zeros(())
    for name, g in zip(loss.weights, gradients, strict=True):
        norm = norm + (g.masked_fill(loss.held[name], 0) if name in loss.held else g).square().sum()
    return norm


# Sharpness


def sharpness(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    directions: Tensor,
    epsilons: Tensor | Sequence[float],
    held: Held | None = None,
    *,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute loss and accuracy at w + eps v, for every direction v and every eps.

    The weights are not written to, so there is no drift.

    Args:
        model: See the module's docstring, like the next four.
        images: (N, ...) floats.
        labels: (N,) integers.
        held: What pruning holds at zero.
        chunk: Images in one batch.
        directions: (D, P), in units of the weights; held coordinates do not move.
        epsilons: (E,).

    Returns:
        Mean losses and accuracies in percent, (D, E) each, float64 on the CPU.
    """
    steps = _finite("epsilons", epsilons)
    if not isinstance(directions, Tensor):
        raise ValueError(f"directions must be a tensor, got {type(directions).__name__}")
    loss = Loss(model, images, labels, held, chunk)
    if directions.shape[1:] != (loss.size,) or not directions.isfinite().all():
        raise ValueError(
            f"directions must be finite (D, {loss.size}), a column a parameter, "
            f"got {tuple(directions.shape)}"
        )
    directions = loss.filled(loss.picked(directions.to(loss.like)))
    out = torch.empty(2, len(directions), len(steps), dtype=torch.float64)
    for i, direction in enumerate(directions):
        for j, epsilon in enumerate(steps):
            moved = loss.moved(epsilon * direction)
            out[0, i, j], out[1, i, j] = loss.evaluate(moved)
    return out[0], out[1]


def _finite(name: str, values: Tensor | Sequence[float]) -> list[float]:
    """Return values as finite numbers, or raise ValueError."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):  # one number, or none
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} must be a sequence of finite numbers, got {values!r}")
    return numbers
