"""Approximation of matrices and tensors by factors, under a metric.

Float64 on the host, where the sizes of small models take milliseconds; matrices whose smaller side is over `LARGE` are
cut by a randomized method in float32, under jit, on the device that JAX has.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

LARGE = 1024  # the smaller side above which low ranks are found by `randomized_svd`
_ROWS = 4096  # rows of a table worked on at once
_FLOOR = 1e-6  # eigenvalues of a metric that is inverted are raised to this share of their mean


class Factors(NamedTuple):
    """left [n, R] · right [R, m] and the spectrum that was cut.

    `spectrum` holds all singular values in the metric, so that the squared error is the sum of the tail's squares. Of a
    randomized decomposition, which knows the leading ones alone, its last entry stands for the rest.
    """

    left: Float[np.ndarray, "n R"]
    right: Float[np.ndarray, "R m"]
    spectrum: Float[np.ndarray, " k"]


def _check_rank(rank: int, n: int, m: int) -> None:
    if not 1 <= rank <= min(n, m):
        raise ValueError(f"rank {rank} is not in 1 … {min(n, m)} for a {n}×{m} matrix")


def output_pca(
    weight: Float[np.ndarray, "n m"], rank: int, second_moment: Float[np.ndarray, "n n"] | None = None
) -> Factors:
    """The rank-R matrix A·B that minimises E‖x(W - AB)‖², x with second moment C = E[xᵀx].

    B holds the leading eigenvectors of WᵀCW and A = WBᵀ: the output-PCA form of whitened SVD, equal to
    SVD(LᵀW) with C = LLᵀ (SVD-LLM, Wang et al. 2024), but without Cholesky or inverse, so safe when C is singular.
    C = None, or zero, is the identity: the plain truncated SVD (Eckart & Young 1936). A matrix whose smaller side is
    over `LARGE` goes to `randomized_svd` for ranks up to a quarter of it.

    Raises ValueError for a rank outside 1 … min(n, m).
    """
    w = np.asarray(weight, np.float64)
    _check_rank(rank, *w.shape)
    c = None if second_moment is None or not np.any(second_moment) else np.asarray(second_moment, np.float64)
    if min(w.shape) > LARGE and rank <= min(w.shape) // 4:
        return randomized_svd(w, rank, c)
    if w.shape[0] < w.shape[1]:  # the Gram matrix would be singular, and larger than the matrix
        _, s, vt = np.linalg.svd(w if c is None else _root_of(c) @ w, full_matrices=False)
        return Factors(w @ vt[:rank].T, vt[:rank], s)
    gram = w.T @ w if c is None else w.T @ c @ w
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    right = vectors[:, ::-1][:, :rank].T
    return Factors(w @ right.T, right, np.sqrt(np.maximum(values[::-1], 0.0)))


def randomized_svd(
    weight: Float[np.ndarray, "n m"],
    rank: int,
    second_moment: Float[np.ndarray, "n n"] | None = None,
    *,
    oversampling: int = 16,
    iterations: int = 4,
    seed: int = 0,
) -> Factors:
    """`output_pca` by subspace iteration from random vectors (Halko, Martinsson & Tropp 2011, algorithm 4.4).

    The right factor spans the leading right singular vectors of C^½W, found through products with W and C alone.

    Args:
      oversampling: vectors carried beside the R that are kept.
      iterations: products with WᵀCW; each divides what the cut directions leave behind by the square of the ratio of
        their singular values to the kept ones.
      seed: of the random vectors.

    Raises ValueError for a rank outside 1 … min(n, m).
    """
    w = np.asarray(weight, np.float64)
    _check_rank(rank, *w.shape)
    start = np.random.default_rng(seed).normal(size=(w.shape[1], min(rank + oversampling, *w.shape)))
    c = None if second_moment is None else jnp.asarray(second_moment, jnp.float32)
    scale = np.abs(w).max() or 1.0  # float32 squares neither vanish nor overflow
    found = _subspace(jnp.asarray(w / scale, jnp.float32), c, jnp.asarray(start, jnp.float32), iterations)
    vectors, values, total = (np.asarray(x, np.float64) for x in found)
    right = vectors[:, :rank].T
    kept = np.maximum(values[:rank], 0.0)
    spectrum = np.sqrt(np.append(kept, max(float(total) - kept.sum(), 0.0))) * scale
    return Factors(w @ right.T, right, spectrum)


@functools.partial(jax.jit, static_argnums=3)
def _subspace(w, c, start, iterations: int):
    """Leading eigenvectors [m, k] and eigenvalues [k], falling, of WᵀCW, and its trace."""
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    weighted = w if c is None else dot(c, w)
    basis = jnp.linalg.qr(start)[0]
    for _ in range(iterations):
        basis = jnp.linalg.qr(dot(w.T, dot(weighted, basis)))[0]
    small = dot(dot(w, basis).T, dot(weighted, basis))
    values, vectors = jnp.linalg.eigh((small + small.T) / 2)
    return dot(basis, vectors[:, ::-1]), values[::-1], jnp.sum(w * weighted)


def input_pca(weight: Float[np.ndarray, "n m"], rank: int, second_moment: Float[np.ndarray, "n n"]) -> Factors:
    """The map behind the projection of its input on the R leading eigenvectors Q of C: QQᵀW.

    The spectrum's entry i is √λ_i‖q_iᵀW‖: what component i adds to the output's squared error when it is cut. It does
    not fall evenly, since Q knows nothing of W, and it has n entries: with n > m even R = m loses something.

    Raises ValueError for a rank outside 1 … min(n, m).
    """
    w = np.asarray(weight, np.float64)
    _check_rank(rank, *w.shape)
    values, vectors = np.linalg.eigh(np.asarray(second_moment, np.float64))
    vectors = vectors[:, ::-1]
    through = vectors.T @ w
    spectrum = np.sqrt(np.maximum(values[::-1], 0.0) * (through**2).sum(1))
    return Factors(vectors[:, :rank], through[:rank], spectrum)


def kronecker_svd(
    weight: Float[np.ndarray, "n m"],
    rank: int,
    second_moment: Float[np.ndarray, "n n"],
    gradient_moment: Float[np.ndarray, "m m"],
) -> Factors:
    """The rank-R matrix that minimises tr EᵀCEG for the error E: a Kronecker-factored Fisher metric.

    C = E[xᵀx] and G = E[gᵀg], g the loss's gradient with respect to the output (K-FAC, Martens & Grosse 2015):
    C⊗G stands for the Fisher matrix, and tr EᵀCEG/2 for the loss that E costs. Eigenvalues of G below 1e-6 of their
    mean are raised to it, since G is inverted.

    Raises ValueError for a rank outside 1 … min(n, m).
    """
    w = np.asarray(weight, np.float64)
    values, vectors = np.linalg.eigh(np.asarray(gradient_moment, np.float64))
    root = _root(np.maximum(values, 0.0))
    factors = output_pca(w @ (vectors * root), rank, second_moment)  # in G's eigenbasis, stretched
    return Factors(factors.left, (factors.right / root) @ vectors.T, factors.spectrum)


def cut_between(
    first: Float[np.ndarray, "d d"], second: Float[np.ndarray, "d d"], rank: int
) -> tuple[Float[np.ndarray, "d R"], Float[np.ndarray, "R d"], Float[np.ndarray, " d"]]:
    """down [d, R], up [R, d] and the spectrum: the product (A·down)(up·B) is the nearest one of rank R to A·B.

    A and B enter by their Gram matrices, `first` = AᵀCA and `second` = BDBᵀ, where errors E of the product cost
    tr EᵀCED: with BDBᵀ = TTᵀ and the leading eigenvectors U of TᵀAᵀCAT, down = TU and up = UᵀT⁻¹. Equal to the
    truncated SVD of C^½ABD^½, at the price of d×d matrices. Both may be sums over several A, or B, that share the
    other one. Eigenvalues of `second` below 1e-6 of their mean are raised to it.

    Raises ValueError for a rank outside 1 … d.
    """
    _check_rank(rank, *np.shape(first))
    values, vectors = np.linalg.eigh(np.asarray(second, np.float64))
    root = _root(np.maximum(values, 0.0))
    gram = (vectors * root).T @ np.asarray(first, np.float64) @ (vectors * root)
    squares, turned = np.linalg.eigh((gram + gram.T) / 2)
    turned = turned[:, ::-1][:, :rank]
    down, up = (vectors * root) @ turned, (turned.T / root) @ vectors.T
    return down, up, np.sqrt(np.maximum(squares[::-1], 0.0))


def shifted_target(
    weight: Float[np.ndarray, "n m"],
    second_moment: Float[np.ndarray, "n n"],
    cross_moment: Float[np.ndarray, "n n"],
    damping: float = 1e-3,
) -> Float[np.ndarray, "n m"]:
    """The matrix W* whose product with shifted inputs X' is nearest to XW: of least ‖X'W* - XW‖² + λ‖W* - W‖².

    W* = W + (C' + λI)⁻¹(K - C')W with C' = E[x'ᵀx'] and K = E[x'ᵀx]. Its truncation under C' is reduced-rank regression
    of XW on X' (Izenman 1975). Unshifted inputs leave W as it is; λ is `damping` times the mean eigenvalue of C'.
    """
    w, n = np.asarray(weight, np.float64), len(second_moment)
    ridge = damping * np.trace(second_moment, dtype=np.float64) / n
    if not ridge > 0:
        return w
    shift = np.array(cross_moment, np.float64)
    shift -= second_moment
    shift = shift @ w  # one n×n matrix beside the moments is held at a time
    return w + np.linalg.solve(with_ridge(second_moment, ridge), shift)


def with_ridge(matrix: Float[np.ndarray, "n n"], ridge: float) -> Float[np.ndarray, "n n"]:
    """A + λI in float64, without an identity matrix beside it."""
    found = np.array(matrix, np.float64)
    found.flat[:: len(found) + 1] += ridge
    return found


def row_weighted_svd(
    table: Float[np.ndarray, "V D"], rank: int, weights: Float[np.ndarray, " V"] | None = None
) -> Factors:
    """The rank-R table A·B that minimises Σ_v w_v ‖E_v - A_v B‖² (GroupReduce, Chen et al. 2018, eq. 2).

    B is orthonormal, so that A = EBᵀ (in the table's dtype); zero weights are allowed.
    """
    e = np.asarray(table)
    _check_rank(rank, *e.shape)
    gram = np.zeros((e.shape[1], e.shape[1]))
    for start in range(0, len(e), _ROWS):  # float64 sums without a float64 copy of the table
        part = e[start : start + _ROWS].astype(np.float64)
        gram += part.T @ (part if weights is None else part * np.asarray(weights[start : start + _ROWS])[:, None])
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    right = vectors[:, ::-1][:, :rank].T
    return Factors(e @ right.T.astype(e.dtype), right, np.sqrt(np.maximum(values[::-1], 0.0)))


def two_sided_svd(
    weight: Float[np.ndarray, "n m"], rank: int, rows: Float[np.ndarray, " n"], columns: Float[np.ndarray, " m"]
) -> Factors:
    """The truncated SVD of diag(√rows)·W·diag(√columns), undone: a diagonal Fisher metric (FWSVD, Hsu et al. 2022).

    `rows` and `columns` are positive weights; values below 1e-6 of their mean are raised to it.
    """
    w = np.asarray(weight, np.float64)
    _check_rank(rank, *w.shape)
    left, right = _root(rows), _root(columns)
    u, s, vt = np.linalg.svd(left[:, None] * w * right, full_matrices=False)
    return Factors(u[:, :rank] * s[:rank] / left[:, None], vt[:rank] / right, s)


def tensor_train(
    matrix: Float[np.ndarray, "n m"], rows: Sequence[int], columns: Sequence[int], ranks: Sequence[int]
) -> list[Float[np.ndarray, "r n m s"]]:
    """The cores [r_{k-1}, n_k, m_k, r_k] of a tensor train close to W, by TT-SVD (Oseledets 2011, algorithm 1).

    The squared error is at most the sum of what the cut at each r_k loses alone: none at full ranks. Rows up to Π n_k
    are zeros.
    """
    from tensorly.backend import backend_context  # pyright: ignore[reportAttributeAccessIssue]
    from tensorly.decomposition import tensor_train as decompose

    w = np.asarray(matrix, np.float64)
    padded = np.pad(w, ((0, math.prod(rows) - len(w)), (0, 0))).reshape(*rows, *columns)
    count = len(rows)
    paired = padded.transpose([axis for k in range(count) for axis in (k, count + k)])
    with backend_context("numpy", local_threadsafe=True):
        train = decompose(paired.reshape([n * m for n, m in zip(rows, columns, strict=True)]), [1, *ranks, 1])
    return [np.asarray(c).reshape(c.shape[0], n, m, c.shape[-1]) for c, n, m in zip(train, rows, columns, strict=True)]


class Metric(NamedTuple):
    """What an error in some rows costs: ‖S·E‖², with S and its inverse as vectors (diagonal) or matrices."""

    root: np.ndarray
    inverse: np.ndarray

    def apply(self, rows: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
        """S·rows."""
        return self.root[:, None] * rows if self.root.ndim == 1 else self.root @ rows

    def undo(self, rows: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
        """S⁻¹·rows."""
        return self.inverse[:, None] * rows if self.inverse.ndim == 1 else self.inverse @ rows

    @classmethod
    def of_moment(cls, moment: Float[np.ndarray, "n n"], floor: float = 1e-6) -> Metric:
        """S = C^½ of a second moment of inputs: ‖S·E‖² = E‖xE‖². Eigenvalues are at least `floor` of their mean."""
        values, vectors = np.linalg.eigh(np.asarray(moment, np.float64))
        roots = np.sqrt(np.maximum(values, floor * values.mean()))
        return cls((vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T)

    @classmethod
    def of_weights(cls, weights: Float[np.ndarray, " n"]) -> Metric:
        """S = diag(√weights): every row's squared error counts by its weight. See `_root` for the smallest."""
        root = _root(np.asarray(weights, np.float64))
        return cls(root, 1 / root)


def full_cp_rank(modes: Sequence[int]) -> int:
    """A rank at which the sum of rank-one tensors holds any tensor of these modes: all but the largest, multiplied."""
    return math.prod(modes) // max(modes)


def cp(
    tensor: Float[np.ndarray, "*modes"], rank: int, *, sweeps: int = 60, tolerance: float = 1e-5, seed: int = 0
) -> list[np.ndarray]:
    """Factors [size, R], one per mode, of a sum of R rank-one tensors close to `tensor`, by alternating least squares.

    Kolda & Bader 2009, figure 3.3. From the leading left singular vectors of each unfolding, filled up with normal
    ones, until a sweep over all modes changes the relative error by less than `tolerance`. What it finds is a local
    minimum. From `full_cp_rank` on nothing needs to be searched: the largest mode holds the unfolding, the others say
    which of its columns is meant. The factors of a rank-one tensor all have the same norm.
    """
    from tensorly.backend import backend_context  # pyright: ignore[reportAttributeAccessIssue]
    from tensorly.cp_tensor import CPTensor
    from tensorly.decomposition import parafac

    if rank >= full_cp_rank(tensor.shape):
        return _exact_cp(tensor, rank)
    if (scale := np.linalg.norm(tensor)) == 0:
        return [np.zeros((size, rank)) for size in tensor.shape]
    tensor, basis = _squeeze(tensor)
    rng, start = np.random.default_rng(seed), []
    for mode, size in enumerate(tensor.shape):
        vectors = _leading(_unfold(tensor, mode), rank)
        more = rng.normal(size=(size, rank - vectors.shape[1])) / math.sqrt(size)
        start.append(np.concatenate([vectors, more], axis=1))
    # The ridge keeps the normal equations of nearly parallel components solvable; it is far below the tolerance.
    settings: dict[str, Any] = {"init": CPTensor((None, start)), "n_iter_max": sweeps, "tol": tolerance, "l2_reg": 1e-9}
    with backend_context("numpy", local_threadsafe=True):
        found = parafac(tensor / scale, rank, **settings)
    factors = [q @ np.asarray(factor) for q, factor in zip(basis, found.factors, strict=True)]
    norms = [np.maximum(np.linalg.norm(factor, axis=0), 1e-300) for factor in factors]
    even = (scale * math.prod(norms)) ** (1 / len(factors))
    return [factor / norm * even for factor, norm in zip(factors, norms, strict=True)]


def _exact_cp(tensor: np.ndarray, rank: int) -> list[np.ndarray]:
    """Component r stands for one choice of digits in all modes but the largest; components beyond are zero."""
    modes = tensor.shape
    largest = int(np.argmax(modes))
    others = [size for mode, size in enumerate(modes) if mode != largest]
    chosen = np.indices(others).reshape(len(others), -1)
    factors = [np.eye(size)[:, digit] for size, digit in zip(others, chosen, strict=True)]
    factors.insert(largest, np.moveaxis(tensor, largest, 0).reshape(modes[largest], -1))
    return [np.pad(factor, ((0, 0), (0, rank - factor.shape[1]))) for factor in factors]


def tucker(
    tensor: Float[np.ndarray, "*modes"], ranks: Sequence[int], *, sweeps: int = 20, tolerance: float = 1e-5
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The core [r_1, …] and orthonormal factors [size, r] of a Tucker decomposition close to `tensor`.

    By higher-order orthogonal iteration (De Lathauwer et al. 2000b, algorithm 4.2) from the leading singular vectors of
    each unfolding, until a sweep changes the norm of the core by less than `tolerance` of the tensor's; exact at full
    ranks. Written out here since tensorly's fills a rank above what the others allow with random vectors.
    """
    tensor, basis = _squeeze(tensor)
    modes = range(tensor.ndim)
    factors = [_leading(_unfold(tensor, mode), rank) for mode, rank in zip(modes, ranks, strict=True)]
    before, scale = -1.0, np.linalg.norm(tensor)
    for _ in range(sweeps):
        for mode, rank in zip(modes, ranks, strict=True):
            others = [None if other == mode else factor for other, factor in enumerate(factors)]
            factors[mode] = _leading(_unfold(_project(tensor, others), mode), rank)
        held = np.linalg.norm(_project(tensor, factors))
        if held - before <= tolerance * scale:
            break
        before = held
    return _project(tensor, factors), [q @ factor for q, factor in zip(basis, factors, strict=True)]


def _squeeze(tensor: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The tensor in an orthonormal basis [size, r] of each mode, r what the others' sizes allow: nothing is lost.

    Decompositions of the squeezed tensor are those of the tensor (Bro & Andersson 1998): a table of many rows and few
    columns needs no work over its rows but this.
    """
    basis = [np.eye(size) for size in tensor.shape]
    mode = int(np.argmax(tensor.shape))
    if tensor.shape[mode] > tensor.size // tensor.shape[mode]:
        basis[mode], small = np.linalg.qr(_unfold(tensor, mode))
        rest = [size for other, size in enumerate(tensor.shape) if other != mode]
        tensor = np.moveaxis(small.reshape(len(small), *rest), 0, mode)
    return tensor, basis


def _unfold(tensor: np.ndarray, mode: int) -> np.ndarray:
    """[size of the mode, all others]."""
    return np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)


def _project(tensor: np.ndarray, factors: Sequence[np.ndarray | None]) -> np.ndarray:
    """The tensor in the factors' coordinates, [size, r] each; None leaves a mode as it is."""
    for mode, factor in enumerate(factors):
        if factor is not None:
            tensor = np.moveaxis(np.tensordot(factor, tensor, (0, mode)), 0, mode)
    return tensor


def _leading(matrix: Float[np.ndarray, "n m"], rank: int) -> Float[np.ndarray, "n r"]:
    """Orthonormal leading left singular vectors, at most n of them."""
    n, m = matrix.shape
    if n <= m or rank > m:
        return np.linalg.eigh(matrix @ matrix.T)[1][:, ::-1][:, :rank]
    return np.linalg.qr(matrix @ np.linalg.eigh(matrix.T @ matrix)[1][:, ::-1][:, :rank])[0]


def _root(weights: np.ndarray) -> np.ndarray:
    """√weights, floored; all ones when every weight is zero: nothing is known of a matrix that no gradient reached."""
    if not np.any(weights):
        return np.ones_like(weights, dtype=np.float64)
    return np.sqrt(np.maximum(weights, _FLOOR * np.mean(weights)))


def _root_of(moment: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """A matrix R with RᵀR = C."""
    values, vectors = np.linalg.eigh(moment)
    return np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T


def rank_for_energy(spectrum: Float[np.ndarray, " k"], energy: float) -> int:
    """The smallest rank whose leading singular values hold the fraction `energy` of the sum of squares."""
    if not 0 < energy <= 1:
        raise ValueError(f"energy must lie in (0, 1], got {energy}")
    squares = np.asarray(spectrum, np.float64) ** 2
    held = np.cumsum(squares) / squares.sum()
    return int(np.searchsorted(held, energy - 1e-12) + 1)


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number from 1 to `limit` that fits, where larger ones fit less; 1 where none does."""
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
