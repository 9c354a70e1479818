"""The leading eigenpairs of a large symmetric operator, on any device.

The vectors stay on the operator's device, where SciPy's `eigsh` would move each of them to the host
and back, and repeated eigenvalues are found as often as they occur.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

EXTRA = (20, 50)  # fewest and most basis vectors beyond those asked for
CONFIRM = 20  # products spent on the search for a further copy of an eigenvalue
BLOCK = 1 << 16  # columns of the basis that are rotated at a time


class ConvergenceError(RuntimeError):
    """The eigenpairs asked for were not reached to the tolerance asked for."""


def leading_eigenpairs(
    matvec: Callable[[Tensor], Tensor],
    size: int,
    k: int,
    *,
    tol: float = 1e-4,
    max_products: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the k eigenvalues of largest magnitude of a symmetric operator.

    This is thick-restart Lanczos (Wu and Simon, 2000), which for symmetric matrices is the same as
    Krylov-Schur (Stewart, 2001). Every vector is orthogonalised twice against the whole basis. The
    basis lives on `device`; the projected matrix is small and float64. One start vector finds one
    copy of a repeated eigenvalue. So when k pairs have converged, a random vector joins the block,
    and the iteration continues until a round finds nothing new.

    Args:
        matvec: v (size,) -> Av (size,).
        size: The operator's size.
        k: How many eigenpairs to compute.
        tol: Largest residual |Av - av| over the pairs, relative to the largest |a|.
        max_products: Number of products after which the search fails, checked between rounds; None
            means 20 k + 200.
        dtype: Precision of the vectors.
        device: Where the vectors live.

    Returns:
        Values (k,), unit vectors (k, size) and residuals (k,), by magnitude, largest first.

    Raises:
        ConvergenceError: `max_products` are not enough.
        ValueError: k is not within 1 and size, or the operator gives a vector that is not finite.
    """
    if not 1 <= k <= size:
        raise ValueError(f"k must be within 1 and the size {size}, got {k}")
    limit = 20 * k + 200 if max_products is None else max_products
    rows = min(size, k + min(max(k, EXTRA[0]), EXTRA[1]) + 2)
    space = _Space(matvec, torch.zeros(rows, size, dtype=dtype, device=device))
    values, rotation, residuals = _iterate(space, k, tol, limit)
    space.rotate(rotation)
    vectors = space.basis if k == rows else space.basis[:k].clone()
    return (
        torch.tensor(values, dtype=dtype, device=device),
        vectors.div_(vectors.norm(dim=1, keepdim=True)),
        torch.tensor(residuals, dtype=dtype, device=device),
    )


def _iterate(
    space: "_Space", k: int, tol: float, limit: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expand and restart until k pairs have converged: values, rotation (rows, k), residuals."""
    rows, size = space.basis.shape
    space.append_random(0)
    known = None  # the magnitudes that had converged when a random vector last joined
    while True:
        room = rows if rows == size else rows - space.block
        whole = rows == size or known is not None
        space.expand(room if whole else min(room, max(k, space.done + 5)))
        values, rotation, outside = space.ritz()
        residuals = np.linalg.norm(outside, axis=0)
        wanted = tol * abs(values[0])
        converged = residuals[:k].max() <= wanted
        found = np.abs(values[:k])
        agree = known is not None and np.abs(found - known).max() <= 2 * wanted
        if converged and (space.done == size or agree):
            return values[:k], rotation[:, :k], residuals[:k]
        if space.products >= limit:
            raise ConvergenceError(
                f"{(residuals[:k] <= wanted).sum()} of {k} eigenpairs converged to {tol:g} "
                f"after {space.products} products (largest residual "
                f"{residuals[:k].max() / abs(values[0]):.1e}): a larger tol needs fewer"
            )
        if space.done < room and not converged:
            continue
        keep = (k + space.done) // 2
        if converged:
            keep = max(k, min(keep, room - 1 - CONFIRM))
        space.restart(values[:keep], rotation[:, :keep], outside[:, :keep])
        if converged:
            known = found
            if rows - space.block - k > CONFIRM // 2:
                space.append_random(space.done + space.block)
                space.block += 1


class _Space:
    """An orthonormal basis, and the operator on it.

    The operator has been applied to the first `done` rows of the basis; the results lie in the
    span of the first `done + block` rows.

    Attributes:
        matvec: The operator.
        basis: (rows, size), filled up to `done + block`.
        projected: (rows, rows) float64; column j is the operator on basis[j], along the basis.
        products: How many times the operator has been applied.
    """

    def __init__(self, matvec: Callable[[Tensor], Tensor], basis: Tensor) -> None:
        self.matvec, self.basis = matvec, basis
        self.projected = np.zeros((len(basis), len(basis)))
        self.generator = torch.Generator().manual_seed(0)
        self.done, self.block, self.products = 0, 1, 0

    def expand(self, until: int) -> None:
        """Apply the operator to the rows up to `until`; each new component becomes a row."""
        self.products += until - self.done
        for j in range(self.done, until):
            w = self.matvec(self.basis[j]).clone()
            if not w.isfinite().all():
                raise ValueError("the operator gave a vector that is not finite")
            row = min(j + self.block, len(self.basis))
            self.projected[:row, j] = _orthogonalise(w, self.basis[:row])
            if row == len(self.basis):
                continue
            new = float(w.norm())
            if new > 100 * torch.finfo(w.dtype).eps * np.abs(self.projected).max():
                self.projected[row, j] = new
                self.basis[row] = w / new
            else:
                self.append_random(row)
        self.done = until

    def append_random(self, row: int) -> None:
        """Make `row` a random unit vector that is orthogonal to the rows before it."""
        like = self.basis
        w = torch.randn(like.shape[1], generator=self.generator, dtype=like.dtype, device="cpu")
        w = w.to(like.device)
        _orthogonalise(w, self.basis[:row])
        self.basis[row] = w / w.norm()

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the Ritz values (m,), by magnitude, their vectors (m, m), and the residual parts.

        The residual parts, (block, m), are the components of the operator on each Ritz vector
        outside the first m = `done` rows.
        """
        inner = self.projected[: self.done, : self.done]
        values, rotation = np.linalg.eigh((inner + inner.T) / 2)
        order = np.argsort(-np.abs(values), kind="stable")
        rotation = rotation[:, order]
        outside = self.projected[self.done : self.done + self.block, : self.done] @ rotation
        return values[order], rotation, outside

    def restart(self, values: np.ndarray, rotation: np.ndarray, outside: np.ndarray) -> None:
        """Keep these Ritz pairs and the rows not yet expanded; forget the rest."""
        keep = len(values)
        self.rotate(rotation)
        unexpanded = self.basis[self.done : self.done + self.block].clone()
        self.basis[keep : keep + self.block] = unexpanded
        self.projected[:] = 0
        self.projected[:keep, :keep] = np.diag(values)
        self.projected[keep : keep + self.block, :keep] = outside
        self.done = keep

    def rotate(self, rotation: np.ndarray) -> None:
        """Set basis[:n] = rotation^T basis[:m] for a rotation (m, n), in place."""
        m, n = rotation.shape
        turn = torch.tensor(rotation.T, dtype=self.basis.dtype, device=self.basis.device)
        for start in range(0, self.basis.shape[1], BLOCK):
            columns = slice(start, start + BLOCK)
            self.basis[:n, columns] = turn @ self.basis[:m, columns]


def _orthogonalise(w: Tensor, basis: Tensor) -> np.ndarray:
    """Remove from w, in place, its components along the basis' rows; return them in float64.

    Classical Gram-Schmidt done twice is as accurate as modified Gram-Schmidt, and is two products
    with a matrix.
    """
    total = np.zeros(len(basis))
    for _ in range(2):
        along = basis @ w
        w.addmv_(basis.T, along, alpha=-1)
        total += along.cpu().numpy()
    return total
