"""The solver against numpy's eigenvalues of the whole matrix."""

import numpy as np
import pytest
import torch

from paperlib import lanczos

torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 5, 30, 120, 200])
def test_solver_against_numpy(dtype, k):
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.standard_normal((200, 200)))
    known = np.concatenate([[9, -8.9, 8.9, 5, -5], rng.standard_normal(195)])
    matrix = torch.tensor(turn * known @ turn.T, dtype=dtype)
    found = lanczos.leading_eigenpairs(lambda v: matrix @ v, 200, k, dtype=dtype)
    values, vectors, residuals = found
    expected = np.sort(np.abs(np.linalg.eigvalsh(matrix.double().numpy())))[::-1][:k]
    assert values.abs().double().numpy() == pytest.approx(expected, abs=1e-4)
    assert torch.allclose(vectors @ vectors.T, torch.eye(k, dtype=dtype), atol=2e-5)
    actual = (vectors @ matrix - values[:, None] * vectors).norm(dim=1)
    assert residuals.max() <= 1e-4 * 9
    assert torch.allclose(actual, residuals, atol=2e-5)


@pytest.mark.parametrize(
    ("spectrum", "k"),
    [
        ([4.0] * 6 + [-4.0] * 3 + [3.0] * 2, 10),  # repeated, of both signs
        ([10.0, 7, 7, 7, -6, -6, 5, 5, 5, 5], 5),  # k cuts a group
        ([10.0, 9, 1.5, 1.5, 1.5, 1.5, 1.5], 7),  # a far copy of a small one
        ([3.0], 20),  # rank below k
        ([], 3),  # nothing but zeros
        ([1.0] * 400, 30),  # the identity
    ],
)
def test_solver_gives_repeated_eigenvalues(spectrum, k):
    size = 400
    tail = 0.9 * torch.rand(size - len(spectrum), generator=torch.Generator().manual_seed(3))
    tail = tail if len(spectrum) >= 5 else torch.zeros_like(tail)
    diagonal = torch.cat([torch.tensor(spectrum), tail])
    values, vectors, _ = lanczos.leading_eigenpairs(lambda v: diagonal * v, size, k)
    expected = diagonal.abs().sort(descending=True).values[:k]
    assert values.abs().numpy() == pytest.approx(expected.numpy(), abs=1e-4)
    assert torch.allclose(vectors @ vectors.T, torch.eye(k), atol=2e-5)


def test_solver_restarts_and_says_where_it_did_not_converge():
    diagonal = torch.linspace(1, 1.1, 3000)
    with pytest.raises(lanczos.ConvergenceError, match="eigenpairs converged"):
        lanczos.leading_eigenpairs(lambda v: diagonal * v, 3000, 5, tol=1e-5, max_products=60)
    diagonal = torch.cat([torch.linspace(0, 1, 3000), torch.linspace(1.1, 2, 30)])
    values, _, _ = lanczos.leading_eigenpairs(lambda v: diagonal * v, 3030, 30)
    assert values.numpy() == pytest.approx(np.linspace(2, 1.1, 30), abs=1e-4)


def test_solver_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="not finite"):
        lanczos.leading_eigenpairs(lambda v: v * float("nan"), 50, 3)
