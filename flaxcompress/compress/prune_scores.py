"""Which weights go, by their scores: in a row, a matrix, several, a group, or within a budget of saliency."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float


def kept_in_matrix(scores: Float[np.ndarray, "r n"], sparsity: float) -> Bool[np.ndarray, "r n"]:
    """All but the `round(sparsity·size)` lowest scores of the matrix; of equal ones the first go."""
    return _all_but_lowest(scores.reshape(1, -1), round(sparsity * scores.size)).reshape(scores.shape)


def kept_in_rows(scores: Float[np.ndarray, "r n"], sparsity: float) -> Bool[np.ndarray, "r n"]:
    """All but the `round(sparsity·n)` lowest scores of each row (Sun et al. 2024 compare the weights of an output)."""
    return _all_but_lowest(scores, round(sparsity * scores.shape[1]))


def kept_of_groups(scores: Float[np.ndarray, "r n"], n: int, m: int) -> Bool[np.ndarray, "r n"]:
    """The n highest scores of every m neighbours in a row; m must divide the rows."""
    grouped = scores.reshape(-1, m)
    return _all_but_lowest(grouped, m - n).reshape(scores.shape)


def kept_together(
    scores: Mapping[str, Float[np.ndarray, "r n"]], sparsity: float
) -> dict[str, Bool[np.ndarray, "r n"]]:
    """All but the lowest `round(sparsity·size)` scores of all matrices together."""
    flat = np.concatenate([score.reshape(-1) for score in scores.values()])
    return _split(_all_but_lowest(flat[None], round(sparsity * flat.size))[0], scores)


def kept_within(saliency: Mapping[str, Float[np.ndarray, "r n"]], budget: float) -> dict[str, Bool[np.ndarray, "r n"]]:
    """What is left when the largest set goes whose saliencies, αᵢwᵢ², add up to at most `budget`."""
    flat = np.concatenate([part.reshape(-1) for part in saliency.values()]).astype(np.float64)
    order = np.argsort(flat, kind="stable")
    going = int(np.searchsorted(np.cumsum(flat[order]), budget, side="right"))
    return _split(_all_but_lowest(flat[None], going)[0], saliency)


def _all_but_lowest(scores: Float[np.ndarray, "r n"], going: int) -> Bool[np.ndarray, "r n"]:
    kept = np.ones(scores.shape, bool)
    lowest = np.argsort(scores, axis=1, kind="stable")[:, :going]
    np.put_along_axis(kept, lowest, False, axis=1)
    return kept


def _split(flat: Bool[np.ndarray, " k"], like: Mapping[str, np.ndarray]) -> dict[str, Bool[np.ndarray, "r n"]]:
    ends = np.cumsum([part.size for part in like.values()])[:-1]
    return {a: part.reshape(like[a].shape) for a, part in zip(like, np.split(flat, ends), strict=True)}
