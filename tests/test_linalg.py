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
@pytest.mark.parametrize("wide", [False, True])
def test_whitened_error_is_the_tail_of_the_spectrum(rank, singular, wide):
    n, m = (M, N) if wide else (N, M)
    w, c = matrix(shape=(n, m)), moment(n, rank=9 if singular else None)
    factors = linalg.output_pca(w, rank, c)
    assert factors.left.shape == (n, rank) and factors.right.shape == (rank, m)
    total = float(np.einsum("nm,nk,km->", w, c, w))
    tail = (factors.spectrum[rank:] ** 2).sum()
    np.testing.assert_allclose(output_error(w, factors, c), tail, rtol=0, atol=N * M * EPS * total)
    np.testing.assert_allclose((factors.spectrum**2).sum(), total, rtol=N * M * EPS)
    assert (np.diff(factors.spectrum) <= 0).all()


@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize("wide", [False, True])
def test_output_pca_equals_whitened_svd_by_cholesky(rank, wide):
    """SVD-LLM: SVD of LᵀW with C = LLᵀ, the left factor multiplied by L⁻ᵀ."""
    w, c = (matrix(shape=(M, N)), moment(M)) if wide else (matrix(), moment())
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


def gradients(rank=None):
    return moment(M, 7, rank)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_kronecker_svd_equals_the_svd_between_two_roots(rank):
    """SVD of LᵀW L_G with C = LLᵀ and G = L_G L_Gᵀ, undone on both sides; its error is the tail of the spectrum."""
    w, c, g = matrix(), moment(), gradients()
    left, right = np.linalg.cholesky(c), np.linalg.cholesky(g)
    u, s, vt = np.linalg.svd(left.T @ w @ right, full_matrices=False)
    naive = np.linalg.solve(left.T, u[:, :rank] * s[:rank]) @ np.linalg.solve(right.T, vt[:rank].T).T
    got = linalg.kronecker_svd(w, rank, c, g)
    condition = np.linalg.cond(left) * np.linalg.cond(right)
    np.testing.assert_allclose(
        got.left @ got.right, naive, rtol=0, atol=64 * EPS * condition * np.abs(w).max() * math.sqrt(N)
    )
    error, total = loss_error(w, got, c, g), float(np.einsum("nm,nk,kl,lm->", w, c, w, g))
    np.testing.assert_allclose(error, (s[rank:] ** 2).sum(), rtol=0, atol=N * M * EPS * total)
    np.testing.assert_allclose(got.spectrum, s, rtol=0, atol=ROOT * s[0])


def loss_error(w, factors, c, g) -> float:
    """tr EᵀCEG, E = W - AB."""
    e = w - factors.left @ factors.right
    return float(np.einsum("nm,nk,kl,lm->", e, c, e, g))


def test_kronecker_svd_beats_one_sided_whitening_in_the_loss():
    w, c, g = matrix(), moment(), gradients()
    two, one = linalg.kronecker_svd(w, 5, c, g), linalg.output_pca(w, 5, c)
    assert loss_error(w, two, c, g) < 0.9 * loss_error(w, one, c, g)
    assert output_error(w, one, c) < 0.9 * output_error(w, two, c)


@pytest.mark.parametrize("given", ["none", "singular"])
def test_kronecker_svd_at_full_rank_is_lossless_whatever_the_gradients(given):
    g = np.zeros((M, M)) if given == "none" else gradients(rank=4)
    got = linalg.kronecker_svd(matrix(), M, moment(), g)
    # Undoing a root of G whose eigenvalues are floored at 1e-6 of their mean, M of them: a condition of √(M·1e6).
    atol = 64 * EPS * math.sqrt(M * 1e6) * np.abs(matrix()).max() * math.sqrt(N)
    np.testing.assert_allclose(got.left @ got.right, matrix(), rtol=0, atol=atol)


@pytest.mark.parametrize("rank", [1, 5, M])
def test_input_pca_projects_inputs_and_its_error_is_the_tail(rank):
    w, c = matrix(), moment()
    got = linalg.input_pca(w, rank, c)
    q = np.linalg.eigh(c)[1][:, ::-1][:, :rank]
    np.testing.assert_allclose(got.left @ got.right, q @ q.T @ w, rtol=0, atol=N * 8 * EPS * np.abs(w).max())
    total = float(np.einsum("nm,nk,km->", w, c, w))
    tail = (got.spectrum[rank:] ** 2).sum()
    np.testing.assert_allclose(output_error(w, got, c), tail, rtol=0, atol=N * M * EPS * total)
    assert output_error(w, linalg.output_pca(w, rank, c), c) <= tail + N * M * EPS * total


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_cut_between_equals_the_truncated_svd_of_the_whitened_product(rank):
    """A [n, d] and B [d, m] with errors weighed by C on the left and D on the right; the error is the tail."""
    a, b, c, other = matrix(1, (N, 7)), matrix(2, (7, M)), moment(), gradients()
    left, right = np.linalg.cholesky(c), np.linalg.cholesky(other)
    u, s, vt = np.linalg.svd(left.T @ a @ b @ right, full_matrices=False)
    naive = np.linalg.solve(left.T, u[:, :rank] * s[:rank]) @ np.linalg.solve(right.T, vt[:rank].T).T
    down, up, spectrum = linalg.cut_between(a.T @ c @ a, b @ other @ b.T, rank)
    assert down.shape == (7, rank) and up.shape == (rank, 7)
    got = a @ down @ up @ b
    condition = np.linalg.cond(left) * np.linalg.cond(right)
    np.testing.assert_allclose(got, naive, rtol=0, atol=64 * EPS * condition * np.abs(a @ b).max() * math.sqrt(N))
    e = a @ b - got
    total = (s**2).sum()
    error = float(np.einsum("nm,nk,kl,lm->", e, c, e, other))
    np.testing.assert_allclose(error, (s[rank:] ** 2).sum(), rtol=0, atol=N * M * EPS * total)
    np.testing.assert_allclose(spectrum, s[:7], rtol=0, atol=ROOT * s[0])


def test_cut_between_at_full_width_is_lossless_even_where_nothing_is_read():
    for second in (np.zeros((7, 7)), moment(7, rank=3)):
        down, up, _ = linalg.cut_between(moment(7), second, 7)
        # A root floored at 1e-6 of the mean of 7 eigenvalues: a condition of √(7·1e6).
        np.testing.assert_allclose(down @ up, np.eye(7), rtol=0, atol=64 * EPS * math.sqrt(7e6))


def test_shifted_target_is_ridge_regression_on_the_shifted_inputs():
    """The least-squares problem [X'; √λI]·W* = [XW; √λW], solved naively; its truncation is reduced-rank regression."""
    rng = np.random.default_rng(11)
    x = rng.normal(size=(300, N)) @ rng.normal(size=(N, N))
    shifted = x + 0.5 * rng.normal(size=x.shape) @ np.diag(np.geomspace(2, 0.1, N)) @ rng.normal(size=(N, N)) + 0.3
    w, count = matrix(), len(x)
    c, k = shifted.T @ shifted / count, shifted.T @ x / count
    ridge = 1e-3 * np.trace(c) / N
    root = math.sqrt(ridge * count) * np.eye(N)
    naive = np.linalg.lstsq(np.vstack([shifted, root]), np.vstack([x @ w, root @ w]), rcond=None)[0]
    target = linalg.shifted_target(w, c, k)
    atol = 64 * EPS * np.linalg.cond(c + ridge * np.eye(N)) * np.abs(w).max() * math.sqrt(N)
    np.testing.assert_allclose(target, naive, rtol=0, atol=atol)
    kept = [linalg.output_pca(t, 12, c) for t in (target, w)]
    errors = [np.square(shifted @ f.left @ f.right - x @ w).sum() for f in kept]
    assert errors[0] < 0.9 * errors[1]


def test_shifted_target_without_a_shift_is_the_matrix_itself():
    for c in (moment(), moment(rank=5), np.zeros((N, N))):
        np.testing.assert_array_equal(linalg.shifted_target(matrix(), c, c), matrix())


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("shape", [(150, 200), (200, 150)])
def test_randomized_svd_is_close_to_the_exact_one(whitened, shape):
    """On a spectrum such as trained matrices have, s_i ∝ 1/i, its error is within a hundredth of the exact one's."""
    n, m = shape
    rng = np.random.default_rng(2)
    u, v = (np.linalg.qr(rng.normal(size=(k, min(shape))))[0] for k in shape)
    w = (u / np.arange(1, min(shape) + 1)) @ v.T
    c = moment(n) if whitened else None
    exact, got = linalg.output_pca(w, 20, c), linalg.randomized_svd(w, 20, c)
    metric = np.eye(n) if c is None else c
    best, error = output_error(w, exact, metric), output_error(w, got, metric)
    total = float(np.einsum("nm,nk,km->", w, metric, w))
    atol = n * float(np.finfo(np.float32).eps) * total  # float32 sums of n terms
    assert best * (1 - n * m * EPS) <= error <= 1.01 * best + atol
    np.testing.assert_allclose((got.spectrum[20:] ** 2).sum(), error, rtol=0.01, atol=atol)
    np.testing.assert_allclose(got.spectrum[:20] ** 2, exact.spectrum[:20] ** 2, rtol=0.01, atol=atol)


def test_large_matrices_are_cut_by_the_randomized_method(monkeypatch):
    w, c = matrix(shape=(40, 30)), moment(40)
    exact = linalg.output_pca(w, 3, c)
    monkeypatch.setattr(linalg, "LARGE", 20)
    got = linalg.output_pca(w, 3, c)
    assert len(got.spectrum) == 4 and len(exact.spectrum) == 30
    assert len(linalg.output_pca(w, 8, c).spectrum) == 30  # over a quarter of the rank nothing is saved
    rtol = 40 * float(np.finfo(np.float32).eps)
    np.testing.assert_allclose((got.spectrum**2).sum(), (exact.spectrum**2).sum(), rtol=rtol)


@pytest.mark.parametrize("rank", [0, -1, M + 1])
@pytest.mark.parametrize(
    "function",
    [
        lambda w, r: linalg.output_pca(w, r),
        lambda w, r: linalg.row_weighted_svd(w, r),
        lambda w, r: linalg.two_sided_svd(w, r, np.ones(N), np.ones(M)),
        lambda w, r: linalg.kronecker_svd(w, r, np.eye(N), np.eye(M)),
        lambda w, r: linalg.input_pca(w, r, np.eye(N)),
        lambda w, r: linalg.randomized_svd(w, r),
    ],
    ids=["output_pca", "row_weighted_svd", "two_sided_svd", "kronecker_svd", "input_pca", "randomized_svd"],
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
