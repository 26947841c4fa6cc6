"""Low-rank approximation under a metric, against textbook forms written out naively."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flaxcompress import linalg

N, M = 23, 17
EPS = float(np.finfo(np.float64).eps)
# Eigenvectors of a Gram matrix: the squared spectrum is exact to eps, a singular value to its root.
ROOT = math.sqrt(EPS)


def matrix(seed=0, shape=(N, M)):
    return np.random.default_rng(seed).normal(size=shape)


def moment(n=N, seed=1, rank=None):
    """A second moment of correlated inputs; singular when `rank` < n."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(400, rank or n)) * np.geomspace(3, 0.05, rank or n) @ rng.normal(size=(rank or n, n))
    return x.T @ x / len(x)


def output_error(w, factors, c) -> float:
    """E‖x(W - AB)‖² = tr (W - AB)ᵀ C (W - AB)."""
    e = w - factors.left @ factors.right
    return float(np.einsum("nm,nk,km->", e, c, e))


@pytest.mark.parametrize("rank", [1, 5, M])
@pytest.mark.parametrize("singular", [False, True])
def test_whitened_error_is_the_tail_of_the_spectrum(rank, singular):
    w, c = matrix(), moment(rank=9 if singular else None)
    factors = linalg.output_pca(w, rank, c)
    assert factors.left.shape == (N, rank) and factors.right.shape == (rank, M)
    total = float(np.einsum("nm,nk,km->", w, c, w))
    tail = (factors.spectrum[rank:] ** 2).sum()
    np.testing.assert_allclose(output_error(w, factors, c), tail, rtol=0, atol=N * M * EPS * total)
    np.testing.assert_allclose((factors.spectrum**2).sum(), total, rtol=N * M * EPS)
    assert (np.diff(factors.spectrum) <= 0).all()


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_output_pca_equals_whitened_svd_by_cholesky(rank):
    """SVD-LLM: SVD of LᵀW with C = LLᵀ, the left factor multiplied by L⁻ᵀ."""
    w, c = matrix(), moment()
    lower = np.linalg.cholesky(c)
    u, s, vt = np.linalg.svd(lower.T @ w, full_matrices=False)
    naive = np.linalg.solve(lower.T, u[:, :rank] * s[:rank]) @ vt[:rank]
    got = linalg.output_pca(w, rank, c)
    # The naive form inverts L: its error carries L's condition number.
    atol = 64 * EPS * np.linalg.cond(lower) * np.abs(w).max() * math.sqrt(N)
    np.testing.assert_allclose(got.left @ got.right, naive, rtol=0, atol=atol)
    np.testing.assert_allclose(got.spectrum, s, rtol=0, atol=ROOT * s[0])


@pytest.mark.parametrize("rank", [1, 6, M])
def test_without_a_metric_it_is_the_truncated_svd(rank):
    w = matrix()
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    naive = (u[:, :rank] * s[:rank]) @ vt[:rank]
    for factors in (linalg.output_pca(w, rank), linalg.row_weighted_svd(w, rank)):
        np.testing.assert_allclose(factors.left @ factors.right, naive, rtol=0, atol=N * M * EPS * s[0])
        np.testing.assert_allclose(factors.spectrum, s, rtol=0, atol=ROOT * s[0])


@pytest.mark.parametrize("rank", [1, 4, M])
@pytest.mark.parametrize("zeros", [0, 6])
def test_row_weighted_svd_is_optimal(rank, zeros):
    """No rank-R table has less Σ w_v‖E_v - Ê_v‖² than SVD(diag(√w)·E); rows of weight zero cost nothing."""
    table = matrix(3, (60, M))
    weights = np.random.default_rng(4).exponential(size=60) ** 3
    weights[:zeros] = 0
    root = np.sqrt(weights)[:, None]
    s = np.linalg.svd(root * table, compute_uv=False)
    factors = linalg.row_weighted_svd(table, rank, weights)
    error = (weights[:, None] * (table - factors.left @ factors.right) ** 2).sum()
    np.testing.assert_allclose(error, (s[rank:] ** 2).sum(), rtol=0, atol=60 * M * EPS * (s**2).sum())
    np.testing.assert_allclose(factors.spectrum, s, rtol=0, atol=ROOT * s[0])
    np.testing.assert_allclose(factors.right @ factors.right.T, np.eye(rank), rtol=0, atol=M * 4 * EPS)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_whitening_beats_plain_on_outputs(rank):
    w, c = matrix(), moment()
    plain, whitened = linalg.output_pca(w, rank), linalg.output_pca(w, rank, c)
    assert output_error(w, whitened, c) < 0.9 * output_error(w, plain, c)
    identity = np.eye(N)
    assert output_error(w, plain, identity) < output_error(w, whitened, identity)


def test_two_sided_svd_is_a_weighted_svd():
    w = matrix()
    rng = np.random.default_rng(5)
    rows, columns = rng.exponential(size=N) + 0.01, rng.exponential(size=M) + 0.01
    scaled = np.sqrt(rows)[:, None] * w * np.sqrt(columns)
    u, s, vt = np.linalg.svd(scaled, full_matrices=False)
    naive = (u[:, :4] * s[:4]) @ vt[:4] / np.sqrt(rows)[:, None] / np.sqrt(columns)
    got = linalg.two_sided_svd(w, 4, rows, columns)
    np.testing.assert_allclose(got.left @ got.right, naive, rtol=1e-10, atol=N * M * EPS * np.abs(naive).max())
    np.testing.assert_allclose(got.spectrum, s, rtol=N * M * EPS)
    full = linalg.two_sided_svd(w, M, rows, columns)
    np.testing.assert_allclose(full.left @ full.right, w, rtol=0, atol=1e3 * N * M * EPS * np.abs(w).max())


@pytest.mark.parametrize("empty", ["rows", "columns", "both"])
def test_two_sided_svd_without_gradients_is_finite(empty):
    """A matrix that nothing reads has no gradient: the factors must still be finite."""
    rows = np.zeros(N) if empty != "columns" else np.ones(N)
    columns = np.zeros(M) if empty != "rows" else np.ones(M)
    got = linalg.two_sided_svd(matrix(), M, rows, columns)
    assert np.isfinite(got.left).all() and np.isfinite(got.right).all()


@pytest.mark.parametrize("rank", [0, -1, M + 1])
@pytest.mark.parametrize(
    "function",
    [
        lambda w, r: linalg.output_pca(w, r),
        lambda w, r: linalg.row_weighted_svd(w, r),
        lambda w, r: linalg.two_sided_svd(w, r, np.ones(N), np.ones(M)),
    ],
    ids=["output_pca", "row_weighted_svd", "two_sided_svd"],
)
def test_rank_bounds(function, rank):
    with pytest.raises(ValueError, match=rf"rank {rank} is not in 1 … 17 for a 23×17 matrix"):
        function(matrix(), rank)


def test_rank_for_energy():
    spectrum = np.sqrt([6.0, 3.0, 1.0, 0.0])
    assert [linalg.rank_for_energy(spectrum, e) for e in (0.1, 0.6, 0.61, 0.9, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]
    for energy in (0.0, 1.01, -1.0):
        with pytest.raises(ValueError, match="energy must lie in"):
            linalg.rank_for_energy(spectrum, energy)
