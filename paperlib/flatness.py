"""Flatness: the Hessian's leading eigenpairs, the gradients' covariance, the loss around a minimum.

Definitions of arXiv 1906.03728, section 3 and appendix E. Everything is of the mean cross-entropy
in evaluation mode; a parameter that pruning holds at zero is no coordinate of it. Arguments that
recur:

model: any network of float images; its mode, weights, gradients and buffers are left as they were.
images, labels: (N, ...) floats, normalised, and (N,) integers; moved to the model's device.
held: parameter name -> bool tensor of its shape, True where pruning holds it at zero.
chunk: images that go through the network at once.

P counts all parameters, held or not, in the order of `model.parameters()`. Bad input raises
ValueError before any long work.
"""

import logging
import math
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from tqdm.auto import tqdm

from paperlib import backends, convolutions, memory, per_image
from paperlib.landscape import RISE
from paperlib.landscape import delta_w as delta_w
from paperlib.landscape import tic as tic

log = logging.getLogger(__name__)

Held = Mapping[str, Tensor]
EXTRA = (20, 50)  # least and most basis vectors beyond those asked for
CONFIRM = 20  # products spent on looking for a further copy of an eigenvalue
BLOCK = 1 << 16  # columns of the basis that are rotated at once
VECTORISED = 32  # images whose gradients are computed at once
CHECK = 2  # images whose gradients verify the layer-by-layer norms


class ConvergenceError(RuntimeError):
    """The eigenpairs asked for were not reached to the tolerance asked for."""


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
    """The k eigenvalues of largest magnitude, of either sign, and their eigenvectors.

    tol: largest |Hv - av| over the pairs, relative to the largest |a|; an eigenvalue's error is
    of the order of its square over the gap to the next. chunk and memory: see `hessian_operator`.
    max_products: Hessian-vector products to spend, 20 k + 200 if None. seed: of the start vector.
    progress: shows a bar of the products.

    Returns eigenvalues (k,), by magnitude, largest first, repeated ones as often as they occur;
    eigenvectors (k, P), unit rows, zero at held coordinates; and, if return_residuals,
    |Hv - av| of each pair (k,), which is logged as well. Same input and seed, same result.

    Raises ValueError where k is not within 1 and the number of free parameters, and
    ConvergenceError where `max_products` are not enough.
    """
    free = _free(model, held)
    size = _parameters(model)[1] if free is None else len(free)
    if not 1 <= k <= size:
        raise ValueError(f"k must be within 1 and the {size} free parameters, got {k}")
    matvec, size = hessian_operator(model, images, labels, held, chunk=chunk, memory=memory)
    start = next(model.parameters())
    values, vectors, residuals = leading_eigenpairs(
        matvec,
        size,
        k,
        tol=tol,
        max_products=max_products,
        seed=seed,
        dtype=start.dtype,
        device=start.device,
        progress=progress,
    )
    del matvec
    if free is not None:
        vectors = vectors.new_zeros(k, _parameters(model)[1]).index_copy_(1, free, vectors)
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
    """v (F,) -> Hv (F,) over the F free coordinates, and F.

    Hv is the gradient of gradient-dot-v by a second reverse pass (Pearlmutter, 1994). The graph of
    the gradient does not depend on v, so it is built once and kept, for as many chunks as fit into
    `memory` GiB; for the others it is built in every product, which costs about half as much again.
    On a CPU convolutions of few pixels are products of matrices (`convolutions.quick`). chunk: 64
    there, where larger ones leave the caches, else 512.
    """
    images, labels = _checked(model, images, labels, chunk)
    free = _free(model, held)
    weights, total = _parameters(model)
    images, weights = _laid_out(images, weights, torch.contiguous_format)
    weights = {name: w.requires_grad_() for name, w in weights.items()}
    pieces = _chunks(images, labels, chunk)

    def gradient_graph(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        with _measuring(model), convolutions.quick(model):
            loss = F.cross_entropy(_call(model, weights, x), y, reduction="sum") / len(labels)
            _finite(loss.detach())
            return torch.autograd.grad(
                loss, list(weights.values()), create_graph=True, materialize_grads=True
            )

    kept: list[tuple[Tensor, ...] | None] = []
    budget = memory * 2**30
    for x, y in pieces:
        with _saved_bytes() as saved:
            graph = gradient_graph(x, y) if budget > 0 else None
        budget -= sum(saved.values())
        kept.append(graph if budget > 0 else None)

    def matvec(v: Tensor) -> Tensor:
        full = v if free is None else v.new_zeros(total).index_copy_(0, free, v)
        directions = _split(full, weights)
        out = torch.zeros_like(full)
        for graph, (x, y) in zip(kept, pieces, strict=True):
            gradients = gradient_graph(x, y) if graph is None else graph
            curved = [i for i, g in enumerate(gradients) if g.requires_grad]
            with _measuring(model):
                products = torch.autograd.grad(
                    [gradients[i] for i in curved],
                    list(weights.values()),
                    [directions[i] for i in curved],
                    retain_graph=graph is not None,
                    materialize_grads=True,
                )
            out += torch.cat([p.flatten() for p in products])
        return out if free is None else out[free]

    return matvec, total if free is None else len(free)


def leading_eigenpairs(
    matvec: Callable[[Tensor], Tensor],
    size: int,
    k: int,
    *,
    tol: float = 1e-4,
    max_products: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k eigenvalues of largest magnitude of a symmetric operator.

    Thick-restart Lanczos (Wu and Simon, 2000; for symmetric matrices the same as Krylov-Schur,
    Stewart, 2001), every vector orthogonalised twice against the whole basis, which lives on
    `device` while the projected matrix is small and float64. One start vector sees one copy of a
    repeated eigenvalue. So when k pairs have converged a random vector joins the block and the
    iteration goes on until a round brings nothing new.

    Returns values (k,), vectors (k, size), residuals |Av - av| (k,), by magnitude, largest first.
    Raises ConvergenceError where `max_products` (20 k + 200 if None) are not enough, and
    ValueError where k is not within 1 and size or the operator gives a non-finite vector.
    """
    if not 1 <= k <= size:
        raise ValueError(f"k must be within 1 and the size {size}, got {k}")
    limit = 20 * k + 200 if max_products is None else max_products
    rows = min(size, k + min(max(k, EXTRA[0]), EXTRA[1]) + 2)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.zeros(rows, size, dtype=dtype, device=device)
    projected = np.zeros((rows, rows))  # column j: the operator on basis[j], along the basis
    _append_random(basis, 0, generator)
    block = 1  # rows [0, done) are expanded: the operator on them lies in rows [0, done + block)
    done = products = 0
    known = None  # the magnitudes that had converged when a random vector last joined
    with tqdm(desc="Hessian-vector products", disable=not progress) as bar:
        while True:
            room = rows if rows == size else rows - block
            until = room if rows == size or known is not None else min(room, max(k, done + 5))
            for j in range(done, until):
                _expand(matvec, basis, projected, j, block, generator)
            bar.update(until - done)
            products += until - done
            done = until
            values, rotation, outside = _ritz(projected, done, block)
            residuals = np.linalg.norm(outside, axis=0)
            wanted = tol * abs(values[0])
            bar.set_postfix_str(f"residual {residuals[:k].max():.1e}, wanted {wanted:.1e}")
            converged = residuals[:k].max() <= wanted
            found = np.abs(values[:k])
            if converged and (done == size or _agree(found, known, 2 * wanted)):
                break
            if products >= limit:
                raise ConvergenceError(
                    f"{(residuals[:k] <= wanted).sum()} of {k} eigenpairs converged to {tol:g} "
                    f"after {products} products (largest residual "
                    f"{residuals[:k].max() / abs(values[0]):.1e}): raise tol or max_products"
                )
            if done < room and not converged:
                continue
            keep = (k + done) // 2
            if converged:
                keep = max(k, min(keep, room - 1 - CONFIRM))
            _rotate(basis, rotation[:, :keep])
            basis[keep : keep + block] = basis[done : done + block].clone()
            projected[:] = 0
            projected[:keep, :keep] = np.diag(values[:keep])
            projected[keep : keep + block, :keep] = outside[:, :keep]
            done = keep
            if converged:
                known = found
                if rows - block - k > CONFIRM // 2:
                    _append_random(basis, done + block, generator)
                    block += 1
    values, residuals = values[:k], residuals[:k]
    log.info("%d eigenpairs, %d products, residual at most %.1e", k, products, residuals.max())
    for value, residual in zip(values, residuals, strict=True):
        log.debug("eigenvalue %.6g, residual %.1e", value, residual)
    _rotate(basis, rotation[:, :k])
    vectors = basis if k == rows else basis[:k].clone()
    return (
        torch.tensor(values, dtype=dtype, device=device),
        vectors.div_(vectors.norm(dim=1, keepdim=True)),
        torch.tensor(residuals, dtype=dtype, device=device),
    )


def _expand(
    matvec: Callable[[Tensor], Tensor],
    basis: Tensor,
    projected: np.ndarray,
    j: int,
    block: int,
    generator: torch.Generator,
) -> None:
    """Applies the operator to basis[j]; what is new in the result becomes row j + block."""
    w = matvec(basis[j]).clone()
    if not w.isfinite().all():
        raise ValueError("the operator gave a vector that is not finite")
    row = min(j + block, len(basis))
    projected[:row, j] = _orthogonalise(w, basis[:row])
    if row == len(basis):
        return
    new = float(w.norm())
    if new > 100 * torch.finfo(basis.dtype).eps * np.abs(projected).max():
        projected[row, j] = new
        basis[row] = w / new
    else:
        _append_random(basis, row, generator)


def _ritz(
    projected: np.ndarray, done: int, block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ritz values (m,), by magnitude, their vectors (m, m), and what they leave out, (block, m)."""
    inner = projected[:done, :done]
    values, rotation = np.linalg.eigh((inner + inner.T) / 2)
    order = np.argsort(-np.abs(values), kind="stable")
    rotation = rotation[:, order]
    return values[order], rotation, projected[done : done + block, :done] @ rotation


def _agree(found: np.ndarray, known: np.ndarray | None, tol: float) -> bool:
    return known is not None and np.abs(found - known).max() <= tol


def _orthogonalise(w: Tensor, basis: Tensor) -> np.ndarray:
    """Takes from w, in place, what lies along the basis' rows; returns how much, float64.

    Classical Gram-Schmidt, twice, which is as good as modified and two products with a matrix.
    """
    total = np.zeros(len(basis))
    for _ in range(2):
        along = basis @ w
        w.addmv_(basis.T, along, alpha=-1)
        total += along.cpu().numpy()
    return total


def _append_random(basis: Tensor, row: int, generator: torch.Generator) -> None:
    w = torch.randn(basis.shape[1], generator=generator, dtype=basis.dtype).to(basis.device)
    _orthogonalise(w, basis[:row])
    basis[row] = w / w.norm()


def _rotate(basis: Tensor, rotation: np.ndarray) -> None:
    """basis[:n] = rotation^T basis[:m] for a rotation (m, n), in place, by blocks of columns."""
    m, n = rotation.shape
    turn = torch.tensor(rotation.T, dtype=basis.dtype, device=basis.device)
    for start in range(0, basis.shape[1], BLOCK):
        columns = slice(start, start + BLOCK)
        basis[:n, columns] = turn @ basis[:m, columns]


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
    """Tr(C): the mean over images of the squared norm of the single-image gradient.

    centered: less the squared norm of the mean gradient, the trace of the covariance proper (1/N).
    Where every parameter belongs to one convolution, dense layer or batch norm, norms come from
    each layer's inputs and output gradients (`per_image`), at about the cost of one gradient; on a
    CPU, chunks then share PyTorch's threads out among themselves. Elsewhere they come from a
    gradient per image, vectorised. Which of the two is settled by comparison on the first images.
    chunk: 64, on a CPU less where there would be fewer chunks than threads.
    """
    images, labels = _checked(model, images, labels, chunk)
    holds = _holds(model, held)
    weights, _ = _parameters(model)
    images, weights = _laid_out(images, weights, torch.channels_last)
    threads = torch.get_num_threads() if images.device.type == "cpu" else 1
    chunk = chunk or min(64, math.ceil(len(images) / threads))
    pieces = _chunks(images, labels, chunk)
    with _measuring(model), memory.kept():
        bar = tqdm(total=len(pieces), desc="Tr(C)", unit="chunk", disable=not progress)
        total = 0.0
        with bar, closing(_squared_norms(model, weights, pieces, holds, threads)) as chunks:
            for norms in chunks:
                total += float(norms.sum())
                _finite(total)
                bar.update()
        if centered:
            total -= _squared_gradient_sum(model, weights, pieces, holds) / len(images)
    return total / len(images)


def _squared_norm(gradients: Mapping[str, Tensor], holds: Held) -> Tensor:
    free = (g.masked_fill(holds[name], 0) if name in holds else g for name, g in gradients.items())
    return sum(g.square().sum() for g in free)


def _squared_norms(model, weights, pieces, holds, threads) -> Iterator[Tensor]:
    """Squared gradient norms (N,) of every chunk, by the quickest way that gives them.

    Whether it gives those of whole gradients is seen on the first CHECK images.
    """
    twin = partial(_twin, model, weights)
    first = pieces[0][0]
    with torch.no_grad(), per_image.Foldable() as found:
        twin()(first[:1])
    for folds in (found.folds, ()):

        def measure(own: nn.Module, x: Tensor, y: Tensor, folds=folds) -> Tensor | None:
            norms = _layer_norms(own, x, y, weights, holds, folds)
            if norms is not None and x is first:
                expected = _norms_one_by_one(model, weights, x[:CHECK], y[:CHECK], holds)
                if not torch.allclose(norms[:CHECK], expected, rtol=1e-3):
                    return None
            return norms

        with closing(_over_chunks(measure, twin, pieces, threads)) as chunks:
            norms = next(chunks)
            if norms is not None:
                yield norms
                yield from chunks
                return
    yield from (_vectorised_norms(model, x, y, weights, holds) for x, y in pieces)


def _over_chunks(
    measure: Callable[[nn.Module, Tensor, Tensor], Tensor | None],
    twin: Callable[[], nn.Module],
    pieces: Sequence[tuple[Tensor, Tensor]],
    threads: int,
) -> Iterator[Tensor | None]:
    """measure(twin(), images, labels) of every chunk, in order; several at once on a CPU.

    Each then has one of PyTorch's threads, and a twin of its own. Within a chunk most tensors are
    too small for a second thread to be of much use.
    """
    if threads == 1 or len(pieces) == 1:
        only = twin()
        for x, y in pieces:
            yield measure(only, x, y)
        return
    own, threads_used = threading.local(), min(threads, len(pieces))
    # All made before the first thread starts: what a chunk measures may use the model itself.
    twins = deque(twin() for _ in range(threads_used))

    def start() -> None:
        torch.get_num_threads()  # sets the thread up, which would undo the next line later on
        torch.set_num_threads(1)
        own.twin = twins.pop()

    def call(piece: tuple[Tensor, Tensor]) -> Tensor:
        with _measuring(own.twin):
            return measure(own.twin, *piece)

    try:
        with ThreadPoolExecutor(threads_used, initializer=start) as pool:
            yield from pool.map(call, pieces)
    finally:
        torch.set_num_threads(threads)  # threads that start from now on take it from here


def _twin(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """The model at these weights, with modules and buffers of its own, to be called beside it."""
    twins = {module: object.__new__(type(module)) for module in model.modules()}
    weight_of = {id(p): weights[name] for name, p in model.named_parameters()}
    for module, twin in twins.items():
        own = vars(module)
        vars(twin).update(
            own,
            _modules={name: twins.get(child) for name, child in own["_modules"].items()},
            _parameters={name: weight_of.get(id(p)) for name, p in own["_parameters"].items()},
            _buffers={
                name: None if b is None else b.clone() for name, b in own["_buffers"].items()
            },
        )
    return twins[model]


def _norms_one_by_one(model, weights, images, labels, holds) -> Tensor:
    """Squared gradient norms (N,), an image after the other."""
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    norms = []
    for x, y in zip(images.split(1), labels.split(1), strict=True):
        loss = F.cross_entropy(_call(model, leaves, x), y)
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        norms.append(_squared_norm(dict(zip(leaves, gradients, strict=True)), holds))
    return torch.stack(norms)


def _vectorised_norms(model, images, labels, weights, holds) -> Tensor:
    """Squared gradient norms (N,), with up to VECTORISED gradients in memory."""

    def norm(image: Tensor, label: Tensor) -> Tensor:
        def loss(w: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(_call(model, w, image[None]), label[None])

        return _squared_norm(grad(loss)(weights), holds)

    return vmap(norm, chunk_size=VECTORISED)(images, labels)


def _layer_norms(model, images, labels, weights, holds, folds=()) -> Tensor | None:
    """Squared gradient norms (N,), layer by layer; None where a parameter is in no known layer."""
    held = {id(w): holds.get(name) for name, w in weights.items()}
    with per_image.LayerNorms(held, len(images), folds) as layers:
        loss = F.cross_entropy(model(images), labels, reduction="sum")
    return layers.backward(loss) if sorted(layers.seen) == sorted(held) else None


def _squared_gradient_sum(model, weights, pieces, holds) -> float:
    """The squared norm of the sum of all images' gradients."""
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    sums = {name: torch.zeros_like(w) for name, w in weights.items()}
    for x, y in pieces:
        loss = F.cross_entropy(_call(model, leaves, x), y, reduction="sum")
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += gradient
    return float(_squared_norm(sums, holds))


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
    """Loss and accuracy at w + eps v, for every direction v and every eps.

    directions: (D, P), in units of the weights; held coordinates do not move. epsilons: (E,).
    Returns mean losses and accuracies in percent, (D, E) each, float64 on the CPU. The weights
    are not written to: every point is w + eps v, so there is no drift. chunk: 64 on the CPU,
    else 512.
    """
    images, labels = _checked(model, images, labels, chunk)
    directions = _directions(model, directions, held)
    _finite(_evaluate(model, _parameters(model)[0], images, labels, chunk)[0])
    epsilons = [float(e) for e in epsilons]
    out = torch.empty(2, len(directions), len(epsilons), dtype=torch.float64)
    bar = tqdm(total=out[0].numel(), desc="sharpness", unit="point", disable=not progress)
    with bar:
        for i, direction in enumerate(directions):
            for j, epsilon in enumerate(epsilons):
                out[0, i, j], out[1, i, j] = _moved(
                    model, images, labels, direction, epsilon, chunk
                )
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
    """`delta_w` by walking outward, both signs, `step` by `step`, no farther than needed.

    The same value as `delta_w` of the `sharpness` at the multiples of `step` up to `limit`.
    """
    images, labels = _checked(model, images, labels, chunk)
    directions = _directions(model, directions, held)
    loss, _ = _evaluate(model, _parameters(model)[0], images, labels, chunk)
    _finite(loss)
    for n in range(1, round(limit / step) + 1):
        for direction in directions:
            for sign in (1, -1):
                moved, _ = _moved(model, images, labels, direction, sign * n * step, chunk)
                if not moved - loss < rise:
                    return n * step
    return math.nan


def _moved(model, images, labels, direction, epsilon, chunk) -> tuple[float, float]:
    weights, _ = _parameters(model)
    steps = _split(direction, weights)
    moved = {n: w + epsilon * s for (n, w), s in zip(weights.items(), steps, strict=True)}
    return _evaluate(model, moved, images, labels, chunk)


def _directions(model: nn.Module, directions: Tensor, held: Held | None) -> Tensor:
    weights, total = _parameters(model)
    if directions.dim() != 2 or directions.shape[1] != total:
        raise ValueError(
            f"directions must be (D, {total}), a column a parameter, got {tuple(directions.shape)}"
        )
    if not directions.isfinite().all():
        raise ValueError("directions must be finite")
    free = _free(model, held)
    directions = directions.to(next(iter(weights.values())))
    if free is None:
        return directions
    return torch.zeros_like(directions).index_copy_(1, free, directions[:, free])


# What they share


def _parameters(model: nn.Module) -> tuple[dict[str, Tensor], int]:
    """Parameters by name, detached and sharing memory, and how many numbers they are."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    if not weights:
        raise ValueError("the model has no parameters")
    return weights, sum(w.numel() for w in weights.values())


def _split(flat: Tensor, weights: Mapping[str, Tensor]) -> list[Tensor]:
    """A vector (P,) as tensors of the parameters' shapes."""
    pieces = flat.split([w.numel() for w in weights.values()])
    return [piece.view(w.shape) for piece, w in zip(pieces, weights.values(), strict=True)]


def _laid_out(
    images: Tensor, weights: Mapping[str, Tensor], layout: torch.memory_format
) -> tuple[Tensor, dict[str, Tensor]]:
    """On a CPU, images and convolutions' weights in this memory format, the quicker one there."""
    if images.device.type != "cpu":
        return images, dict(weights)

    def lay(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=layout) if tensor.dim() == 4 else tensor

    return lay(images), {name: lay(w) for name, w in weights.items()}


def _call(model: nn.Module, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """The logits at other weights; the model's own, and its buffers, are not touched."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return functional_call(model, {**weights, **buffers}, (images,))


def _chunks(images: Tensor, labels: Tensor, chunk: int | None) -> list[tuple[Tensor, Tensor]]:
    chunk = chunk or (64 if images.device.type == "cpu" else 512)
    return list(zip(images.split(chunk), labels.split(chunk), strict=True))


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, full float32, repeatable kernels, nothing compiled; as it was, afterwards.

    What torch.compile makes has no second derivatives, and its layers cannot be watched.
    """
    modes = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(next(model.parameters()).device.type, enabled=False))
        stack.enter_context(
            backends.switched(torch.backends.cudnn, benchmark=False, deterministic=True)
        )
        stack.enter_context(backends.full_float32())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and it is slow to import
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(lambda: [setattr(m, "training", mode) for m, mode in modes.items()])
        model.eval()
        yield


@contextmanager
def _saved_bytes() -> Iterator[dict[int, int]]:
    """Bytes of each block of memory that autograd keeps, by its address."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def _evaluate(model, weights, images, labels, chunk) -> tuple[float, float]:
    """Mean loss, and accuracy in percent."""
    loss = correct = 0.0
    with _measuring(model), torch.no_grad():
        for x, y in _chunks(images, labels, chunk):
            logits = _call(model, weights, x)
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            correct += float((logits.argmax(1) == y).sum())
    return loss / len(labels), 100 * correct / len(labels)


def _checked(
    model: nn.Module, images: Tensor, labels: Tensor, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Images and labels on the model's device, or ValueError."""
    weights, _ = _parameters(model)
    if len(images) == 0:
        raise ValueError("no images")
    if labels.shape != (len(images),):
        raise ValueError(f"{len(images)} images, but labels of shape {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floats, normalised, got {images.dtype}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    like = next(iter(weights.values()))
    images, labels = images.to(like), labels.to(like.device, torch.long)
    with _measuring(model), torch.no_grad():
        logits = _call(model, weights, images[:1])
    if logits.dim() != 2:
        raise ValueError(f"logits must be (N, classes), got {tuple(logits.shape)}")
    classes = logits.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels must be within 0 and {classes - 1}, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    return images, labels


def _finite(loss: float | Tensor) -> None:
    if not math.isfinite(loss):
        raise ValueError(f"the loss is not finite: {float(loss)}")


def _holds(model: nn.Module, held: Held | None) -> dict[str, Tensor]:
    """`held` on the model's device, or ValueError."""
    parameters = dict(model.named_parameters())
    for name, mask in (held or {}).items():
        if name not in parameters:
            raise ValueError(f"held: the model has no parameter {name!r}")
        if mask.shape != parameters[name].shape or mask.dtype != torch.bool:
            raise ValueError(
                f"held[{name!r}] must be bool of shape {tuple(parameters[name].shape)}, "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
    return {name: mask.to(parameters[name].device) for name, mask in (held or {}).items()}


def _free(model: nn.Module, held: Held | None) -> Tensor | None:
    """Indices of the coordinates that are not held, or None where none is held."""
    holds = _holds(model, held)
    if not any(mask.any() for mask in holds.values()):
        return None
    masks = [
        holds.get(name, torch.zeros_like(p, dtype=torch.bool)).flatten()
        for name, p in model.named_parameters()
    ]
    return (~torch.cat(masks)).nonzero().flatten()
