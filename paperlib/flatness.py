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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from tqdm.auto import tqdm

from paperlib.derivatives import check_derivatives, probe
from paperlib.extras.fast import convolutions
from paperlib.lanczos import ConvergenceError as ConvergenceError
from paperlib.lanczos import leading_eigenpairs
from paperlib.loss import Held, Loss, check_finite
from paperlib.measures import RISE
from paperlib.measures import delta_w as delta_w
from paperlib.measures import tic as tic

log = logging.getLogger(__name__)

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
    memory: float = 4.0,
    max_products: int | None = None,
    seed: int = 0,
    return_residuals: bool = False,
    progress: bool = False,
) -> tuple[Tensor, ...]:
    """Compute the Hessian's k eigenvalues of largest magnitude, and their eigenvectors.

    Args:
        model, images, labels, held, chunk: See the module's docstring.
        k: How many eigenpairs to compute.
        tol: Largest |Hv - av| over the pairs, relative to the largest |a|. An eigenvalue's error
            is of the order of its square over the gap to the next.
        memory: See `hessian_operator`.
        max_products: Largest number of Hessian-vector products; None means 20 k + 200.
        seed: Seed of the start vector. The same input and seed give the same result.
        return_residuals: Whether to return the residuals as well.
        progress: Whether to show a bar of the products.

    Returns:
        Eigenvalues (k,) of either sign, by magnitude, largest first, repeated ones as often as they
        occur; eigenvectors (k, P), unit rows, zero at held coordinates; and with return_residuals
        |Hv - av| of each pair (k,).

    Raises:
        ValueError: Bad input, or k is not within 1 and the number of free parameters.
        ConvergenceError: `max_products` are not enough.
    """
    loss = Loss.of(model, images, labels, held, chunk)
    free = loss.free
    size = loss.size if free is None else len(free)
    if not 1 <= k <= size:
        raise ValueError(f"k must be within 1 and the {size} free parameters, got {k}")
    like = next(iter(loss.weights.values()))
    values, vectors, residuals = leading_eigenpairs(
        _operator(loss, memory),
        size,
        k,
        tol=tol,
        max_products=max_products,
        seed=seed,
        dtype=like.dtype,
        device=like.device,
        progress=progress,
    )
    if free is not None:
        vectors = vectors.new_zeros(k, loss.size).index_copy_(1, free, vectors)
    return (values, vectors, residuals) if return_residuals else (values, vectors)


def hessian_operator(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    held: Held | None = None,
    *,
    chunk: int | None = None,
    memory: float = 4.0,
) -> tuple[Callable[[Tensor], Tensor], int]:
    """Make the function v (F,) -> Hv (F,) over the F free coordinates.

    Hv is the gradient of gradient-dot-v by a second reverse pass (Pearlmutter, 1994). The graph of
    the gradient does not depend on v, so it is built once and kept, for as many chunks as fit into
    `memory` GiB. For the others it is built in every product, which costs about half as much again.
    On a CPU convolutions of few pixels are products of matrices (`convolutions.quick`). A product
    does not wait for the device.

    Returns:
        The function, and F.
    """
    loss = Loss.of(model, images, labels, held, chunk)
    free = loss.free
    return _operator(loss, memory), loss.size if free is None else len(free)


def _operator(loss: Loss, memory: float) -> Callable[[Tensor], Tensor]:
    check_derivatives(loss, order=2)
    free, pieces = loss.free, [(_contiguous(x), y) for x, y in loss.pieces]
    weights = {n: _contiguous(w).detach().requires_grad_() for n, w in loss.weights.items()}
    leaves = list(weights.values())

    def gradient_graph(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        with loss.measuring(), convolutions.quick(loss.model):
            return loss.within(
                weights,
                lambda: torch.autograd.grad(
                    loss.total(weights, x, y) / len(loss.labels),
                    leaves,
                    create_graph=True,
                    materialize_grads=True,
                ),
            )

    kept: list[tuple[Tensor, ...] | None] = []
    budget = memory * 2**30
    for x, y in pieces:
        with _saved_bytes() as saved:
            graph = gradient_graph(x, y) if budget > 0 else None
        budget -= sum(saved.values())
        kept.append(graph if budget > 0 else None)

    def matvec(v: Tensor) -> Tensor:
        full = v if free is None else v.new_zeros(loss.size).index_copy_(0, free, v)
        directions = loss.split(full)
        out = torch.zeros_like(full)
        for graph, (x, y) in zip(kept, pieces, strict=True):
            gradients = gradient_graph(x, y) if graph is None else graph
            curved = [i for i, g in enumerate(gradients) if g.requires_grad]
            product = partial(
                torch.autograd.grad,
                [gradients[i] for i in curved],
                leaves,
                [directions[i] for i in curved],
                retain_graph=graph is not None,
                materialize_grads=True,
            )
            with loss.measuring():
                products = loss.within(weights, product)
            out += torch.cat([p.flatten() for p in products])
        return out if free is None else out[free]

    return matvec


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
    progress: bool = False,
) -> float:
    """Compute Tr(C), the mean over images of the squared norm of the single-image gradient.

    Args:
        model, images, labels, held, chunk: See the module's docstring.
        centered: Whether to subtract the squared norm of the mean gradient, which gives the trace
            of the covariance proper (over N). The paper does not.
        progress: Whether to show a bar of the chunks.
    """
    loss = Loss.of(model, images, labels, held, chunk)
    check_derivatives(loss, order=1)
    total = 0.0
    with loss.measuring():
        norms = _squared_norms(loss)
        for x, y in tqdm(loss.pieces, desc="Tr(C)", unit="chunk", disable=not progress):
            total += float(norms(loss, x, y).sum())
        if centered:
            total -= float(_squared_norm(loss, _gradient_sum(loss))) / len(images)
    check_finite(total)
    return total / len(images)


Norms = Callable[[Loss, Tensor, Tensor], Tensor]


def _squared_norms(loss: Loss) -> Norms:
    """Choose how to compute single images' squared gradient norms (N,).

    All at once, unless the network does not allow that or gives other norms then, or their
    gradients take much memory: then one by one is quicker.
    """
    limit = GRADIENTS["cpu" if loss.images.device.type == "cpu" else "other"]
    at_once = min(VECTORISED, loss.chunk, limit // loss.size)
    if at_once < 2:
        return _one_by_one

    def together(loss: Loss, images: Tensor, labels: Tensor) -> Tensor:
        def norm(image: Tensor, label: Tensor) -> Tensor:
            gradients = grad(loss.total)(loss.weights, image[None], label[None])
            return _squared_norm(loss, gradients)

        return vmap(norm, chunk_size=at_once)(images, labels)

    few = probe(loss)
    expected = _one_by_one(few, few.images, few.labels)
    try:
        if torch.allclose(together(few, few.images, few.labels), expected, rtol=1e-3):
            return together
        reason = "other gradients"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind: vmap runs the network's own code
        reason = str(error)
    log.warning("Tr(C) takes an image at a time, because vmap gives: %s", reason)
    return _one_by_one


def _one_by_one(loss: Loss, images: Tensor, labels: Tensor) -> Tensor:
    norms = []
    for x, y in zip(images.split(1), labels.split(1), strict=True):
        norms.append(_squared_norm(loss, _gradients(loss, x, y)))
    return torch.stack(norms)


def _gradients(loss: Loss, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Compute the gradient of these images' total loss."""
    leaves = {name: w.detach().requires_grad_() for name, w in loss.weights.items()}

    def compute() -> tuple[Tensor, ...]:
        total = loss.total(leaves, images, labels)
        return torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)

    return dict(zip(leaves, loss.within(leaves, compute), strict=True))


def _gradient_sum(loss: Loss) -> dict[str, Tensor]:
    """Compute the sum of all images' gradients."""
    sums = {name: torch.zeros_like(w) for name, w in loss.weights.items()}
    for x, y in loss.pieces:
        for name, gradient in _gradients(loss, x, y).items():
            sums[name] += gradient
    return sums


def _squared_norm(loss: Loss, gradients: Mapping[str, Tensor]) -> Tensor:
    """Return the squared norm of a gradient over the free coordinates."""
    held = loss.held
    free = (g.masked_fill(held[name], 0) if name in held else g for name, g in gradients.items())
    return sum(g.square().sum() for g in free)


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
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute loss and accuracy at w + eps v, for every direction v and every eps.

    The weights are not written to, so there is no drift.

    Args:
        model, images, labels, held, chunk: See the module's docstring.
        directions: (D, P), in units of the weights; held coordinates do not move.
        epsilons: (E,).
        progress: Whether to show a bar of the points.

    Returns:
        Mean losses and accuracies in percent, (D, E) each, float64 on the CPU.
    """
    loss = Loss.of(model, images, labels, held, chunk)
    directions = _directions(loss, directions)
    epsilons = [float(e) for e in epsilons]
    out = torch.empty(2, len(directions), len(epsilons), dtype=torch.float64)
    bar = tqdm(total=out[0].numel(), desc="sharpness", unit="point", disable=not progress)
    with bar:
        for i, direction in enumerate(directions):
            for j, epsilon in enumerate(epsilons):
                out[0, i, j], out[1, i, j] = _moved(loss, direction, epsilon)
                bar.update()
    return out[0], out[1]


def find_delta_w(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    directions: Tensor,
    held: Held | None = None,
    *,
    rise: float = RISE,
    step: float = 0.01,
    limit: float = 0.4,
    chunk: int | None = None,
) -> float:
    """Compute `delta_w` by walking outward, both signs, `step` by `step`, no farther than needed.

    The value is that of `delta_w` of the `sharpness` at the multiples of `step` up to `limit`.
    """
    loss = Loss.of(model, images, labels, held, chunk)
    directions = _directions(loss, directions)
    unmoved, _ = loss.evaluate(loss.weights)
    epsilons, losses = [], []
    for n in range(1, round(limit / step) + 1):
        for epsilon in (n * step, -n * step):
            epsilons.append(epsilon)
            losses.append([_moved(loss, direction, epsilon)[0] for direction in directions])
        found = delta_w(list(zip(*losses, strict=True)), epsilons, unmoved, rise)
        if not math.isnan(found):
            return found
    return math.nan


def _moved(loss: Loss, direction: Tensor, epsilon: float) -> tuple[float, float]:
    """Return the mean loss and the accuracy at w + epsilon * direction."""
    steps = loss.split(direction)
    moved = {n: w + epsilon * s for (n, w), s in zip(loss.weights.items(), steps, strict=True)}
    return loss.evaluate(moved)


def _directions(loss: Loss, directions: Tensor) -> Tensor:
    """Return the directions with held coordinates at zero, or raise ValueError."""
    if directions.dim() != 2 or directions.shape[1] != loss.size:
        raise ValueError(
            f"directions must be (D, {loss.size}), a column a parameter, "
            f"got {tuple(directions.shape)}"
        )
    if not directions.isfinite().all():
        raise ValueError("directions must be finite")
    free = loss.free
    directions = directions.to(next(iter(loss.weights.values())))
    if free is None:
        return directions
    return torch.zeros_like(directions).index_copy_(1, free, directions[:, free])
