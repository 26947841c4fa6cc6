"""How close two sets of sentence vectors are, and rank correlation; plain numpy, float64."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

Vectors = Float[np.ndarray, "N D"]
Series = Float[np.ndarray, " N"]
_MOST_ROWS = 1500  # of a full matrix of similarities: 1.1 million pairs
_BLOCK = 512  # rows whose neighbours are searched at once


def cosines(a: Vectors, b: Vectors) -> Series:
    """The cosine between a[i] and b[i], both [N, D], for every i; a zero vector has cosine 0 with everything.

    Raises ValueError when the shapes differ, N is 0, or a value is not finite.
    """
    a, b = _checked(a, b, rows=1)
    if a.shape != b.shape:
        raise ValueError(f"vectors: widths differ, {list(a.shape)} and {list(b.shape)}, so no cosine exists")
    return (_unit(a) * _unit(b)).sum(axis=1)


def mean_cosine(a: Vectors, b: Vectors) -> float:
    """Mean of `cosines`, in [-1, 1]; raises what it raises."""
    return float(cosines(a, b).mean())


def average_ranks(x: Series) -> Series:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, group, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[group]


def spearman(x: Series, y: Series) -> float:
    """Spearman's rank correlation of two series [N], ties given average ranks; in [-1, 1].

    Raises ValueError when lengths differ, N < 2, a value is not finite, or all values of a series are equal.
    """
    x, y = (np.asarray(series, np.float64) for series in (x, y))
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2:
        raise ValueError(f"spearman: two series of equal length >= 2 are needed, got {list(x.shape)}, {list(y.shape)}")
    for name, series in (("first", x), ("second", y)):
        if not np.isfinite(series).all():
            raise ValueError(f"spearman: the {name} series holds values that are not finite")
        if (series == series[0]).all():
            raise ValueError(
                f"spearman: all {len(series)} values of the {name} series are equal, so they have no order"
            )
    ranks = [average_ranks(series) - (len(series) + 1) / 2.0 for series in (x, y)]
    product = float(ranks[0] @ ranks[1]) / float(np.sqrt((ranks[0] @ ranks[0]) * (ranks[1] @ ranks[1])))
    return min(1.0, max(-1.0, product))


def rank_correlation(a: Vectors, b: Vectors, *, rows: int = _MOST_ROWS) -> float:
    """Spearman correlation of all pairwise cosines of a's rows with those of b's, [N, D] and [N, D'].

    With more than `rows` rows, that many at even distances stand for all.

    Raises ValueError as `cosines` and `spearman` do, but widths may differ; N must be at least 3.
    """
    a, b = _checked(a, b, rows=3)
    if len(a) > rows:
        chosen = np.linspace(0, len(a) - 1, rows).round().astype(int)
        a, b = a[chosen], b[chosen]
    above = np.triu_indices(len(a), 1)
    similarities = []
    for vectors in (a, b):
        unit = _unit(vectors)
        similarities.append((unit @ unit.T)[above])
    return spearman(*similarities)


def neighbour_overlap(a: Vectors, b: Vectors, k: int = 10) -> float:
    """Mean share of each row's k nearest other rows, by cosine, that a [N, D] and b [N, D'] have in common; in [0, 1].

    Raises ValueError as `cosines` does, but widths may differ; N must be above k.
    """
    if k < 1:
        raise ValueError(f"neighbour overlap: k must be at least 1, got {k}")
    a, b = _checked(a, b, rows=k + 1)
    units = [_unit(a), _unit(b)]
    shared = 0
    for start in range(0, len(a), _BLOCK):
        near_a, near_b = (_neighbours(unit, start, k) for unit in units)
        shared += int((near_a[:, :, None] == near_b[:, None, :]).sum())
    return shared / (k * len(a))


def _neighbours(unit: Vectors, start: int, k: int) -> np.ndarray:
    """[n, k] indices of the nearest other rows of rows start … start + _BLOCK."""
    similarity = unit[start : start + _BLOCK] @ unit.T
    here = np.arange(len(similarity))
    similarity[here, start + here] = -np.inf
    return np.argpartition(-similarity, k - 1, axis=1)[:, :k]


def _unit(x: Vectors) -> Vectors:
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1.0)


def _checked(a: Vectors, b: Vectors, *, rows: int) -> tuple[Vectors, Vectors]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b):
        raise ValueError(f"vectors: two arrays [N, D] with the same N are needed, got {list(a.shape)}, {list(b.shape)}")
    if len(a) < rows:
        raise ValueError(f"vectors: at least {rows} rows are needed here, got {len(a)}")
    for name, vectors in (("first", a), ("second", b)):
        if not np.isfinite(vectors).all():
            bad = int((~np.isfinite(vectors)).any(axis=1).sum())
            raise ValueError(f"vectors: {bad} rows of the {name} array hold values that are not finite")
    return a, b
