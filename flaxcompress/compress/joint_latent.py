"""One latent for the keys and the values of all heads: the joint truncated SVD of [W_K | W_V]."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from flaxcompress import linalg

_FLOOR = 1e-4  # of a metric's mean eigenvalue: what nothing reads still counts that much


class JointLatent(NamedTuple):
    """x·latent is the latent; times `key` and `value` it gives every head's key and value.

    Attributes:
      spectrum: all singular values of [W_K | W_V] in the metric, of which the first R were kept.
    """

    latent: Float[np.ndarray, "n R"]
    key: Float[np.ndarray, "R K p"]
    value: Float[np.ndarray, "R K d"]
    spectrum: Float[np.ndarray, " k"]


def compress_matrix(
    key: Float[np.ndarray, "n K p"],
    value: Float[np.ndarray, "n K d"],
    rank: int,
    *,
    moments: Float[np.ndarray, "n n"] | None = None,
    key_metric: Float[np.ndarray, "K p p"] | None = None,
    value_metric: Float[np.ndarray, "K d d"] | None = None,
) -> JointLatent:
    """The rank-R approximation of [W_K | β W_V] of least error in the metric; β makes both parts' energies equal.

    The error is E‖x(W - Ŵ)‖² over inputs x with moments C (CARE; SVD-LLM), a key's e counted as e·G·eᵀ and a value's as
    e·O·eᵀ: with G the second moment of the queries that meet the key it is the error of the scores, and with O = W_O·W_Oᵀ
    that of the layer's output. None is the identity. The balance of the two parts is TransMLA's (Meng et al. 2025).

    Raises ValueError for a rank outside 1 … min(n, K(p + d)).
    """
    roots = [_root(key_metric, key), _root(value_metric, value)]
    scaled = []
    for kernel, (root, _) in zip((key, value), roots, strict=True):
        seen = np.einsum("nkp,kpq->nkq", np.asarray(kernel, np.float64), root).reshape(len(kernel), -1)
        scaled.append((seen, _size(seen, moments)))
    joined = np.concatenate([seen / size for seen, size in scaled], 1)
    factors = linalg.output_pca(joined, rank, moments)
    parts = []
    for part, kernel, (_, inverse), (_, size) in zip(
        np.split(factors.right, [scaled[0][0].shape[1]], 1), (key, value), roots, scaled, strict=True
    ):
        parts.append(np.einsum("rkp,kpq->rkq", part.reshape(rank, *kernel.shape[1:]), inverse) * size)
    return JointLatent(factors.left, *parts, factors.spectrum)


def _size(kernel: np.ndarray, moments: np.ndarray | None) -> float:
    """√E‖xW‖²; 1 where that is 0."""
    seen = kernel if moments is None else np.asarray(moments, np.float64) @ kernel
    return float(np.sqrt(max((kernel * seen).sum(), 0.0))) or 1.0


def _root(metric: np.ndarray | None, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(M^½, M^-½) of every head's metric, its eigenvalues floored."""
    heads, width = kernel.shape[1:]
    if metric is None or not width:
        return (np.broadcast_to(np.eye(width), (heads, width, width)),) * 2
    values, vectors = np.linalg.eigh(metric)
    values = np.maximum(values, _FLOOR * values.mean() + np.finfo(np.float64).tiny)
    turned = vectors.swapaxes(1, 2)
    return (vectors * np.sqrt(values)[:, None]) @ turned, (vectors / np.sqrt(values)[:, None]) @ turned
