"""Which of the variables that a matrix reads stay, and how those make up for the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer


def damping_of(second_moment: Float[np.ndarray, "F F"], ridge: float) -> float:
    """λ, `ridge` times the mean eigenvalue of C."""
    return ridge * float(np.trace(second_moment, dtype=np.float64)) / len(second_moment)


def entries(blocks: Integer[np.ndarray, " k"], block: int) -> Integer[np.ndarray, " k*b"]:
    """The variables of blocks of `block` neighbours."""
    return (np.asarray(blocks)[:, None] * block + np.arange(block)).reshape(-1)


def made_from(
    second_moment: Float[np.ndarray, "F F"], kept: Integer[np.ndarray, " k"], *, ridge: float = 1e-2
) -> Float[np.ndarray, "k F"]:
    """The matrix that best makes all F variables from those that stay, given C = E[hᵀh].

    The kept variables make themselves, and each other one by the ridge regression (C_SS + λI)⁻¹C_S: on them: a Nyström
    approximation of C. A map W that reads all of them is repaired by `made_from(…) @ W`, which is least squares.
    """
    c = np.asarray(second_moment, np.float64)
    damping = damping_of(c, ridge)
    if not damping > 0:  # nothing is ever active
        return np.eye(len(c))[kept]
    made = np.linalg.solve(c[np.ix_(kept, kept)] + damping * np.eye(len(kept)), c[kept])
    made[:, kept] = np.eye(len(kept))
    return made


def leverage(second_moment: Float[np.ndarray, "F F"], *, ridge: float = 1e-2) -> Float[np.ndarray, " F"]:
    """How little the other variables explain of each: the diagonal of C(C + λI)⁻¹ (as in MoDeGPT, Lin et al. 2024)."""
    c = np.asarray(second_moment, np.float64)
    damping = damping_of(c, ridge)
    if not damping > 0:
        return np.zeros(len(c))
    values, vectors = np.linalg.eigh((c + c.T) / 2)
    return (vectors**2) @ (np.maximum(values, 0.0) / (np.maximum(values, 0.0) + damping))


def largest(scores: Float[np.ndarray, " F"], count: int) -> Integer[np.ndarray, " k"]:
    """The places of the `count` largest scores, rising; the first ones of equals."""
    return np.sort(np.argsort(-np.asarray(scores), kind="stable")[:count])


def forward_selection(
    second_moments: Sequence[Float[np.ndarray, "F F"]],
    readers: Sequence[Float[np.ndarray, "F D"]],
    count: int,
    *,
    block: int = 1,
    ridge: float = 1e-2,
) -> Integer[np.ndarray, " k"]:
    """The `count` blocks of `block` neighbouring variables, rising, that in turn take most off the readers' error.

    That is E‖hW - h'W‖², h' being made from the variables chosen so far (orthogonal forward selection; Chen et al.
    1991): blind neither to W nor to two variables that say the same. Of several readers, each with inputs of its own,
    the same blocks are chosen, by the sum of their errors, each relative to E‖hW‖².
    """
    states = [_Unexplained(c, w, block, ridge) for c, w in zip(second_moments, readers, strict=True)]
    chosen = np.zeros(len(second_moments[0]) // block, bool)
    for _ in range(count):
        gain = np.sum([state.gain() for state in states], axis=0)
        best = int(np.argmax(np.where(chosen, -np.inf, gain)))
        chosen[best] = True
        for state in states:
            state.explain(best)
    return np.flatnonzero(chosen)


class _Unexplained:
    """What the chosen blocks do not explain of C, and of CW."""

    def __init__(self, second_moment: np.ndarray, reader: np.ndarray, block: int, ridge: float):
        self._rest = np.array(second_moment, np.float64)
        w = np.asarray(reader, np.float64)
        self._seen = self._rest @ w
        self._size = float(np.einsum("fd,fd->", w, self._seen))  # E‖hW‖²
        self._damping = damping_of(self._rest, ridge)
        self._block = block

    def gain(self) -> Float[np.ndarray, " N"]:
        """What each block would take off the error, as a share of E‖hW‖²; 0 where nothing is ever active."""
        blocks = len(self._rest) // self._block
        if not (self._damping > 0 and self._size > 0):
            return np.zeros(blocks)
        read = self._seen.reshape(blocks, self._block, -1)
        at = np.arange(blocks)
        cells = self._rest.reshape(blocks, self._block, blocks, self._block)[at, :, at]
        return (read * np.linalg.solve(self._inner(cells), read)).sum((1, 2)) / self._size

    def explain(self, block: int) -> None:
        """Takes one block as chosen."""
        if not self._damping > 0:
            return
        rows = entries(np.asarray([block]), self._block)
        direction = np.linalg.solve(self._inner(self._rest[np.ix_(rows, rows)]), self._rest[rows])
        self._seen -= direction.T @ self._seen[rows]
        self._rest -= direction.T @ self._rest[rows].copy()

    def _inner(self, cells: Float[np.ndarray, "*N b b"]) -> Float[np.ndarray, "*N b b"]:
        return (cells + np.swapaxes(cells, -1, -2)) / 2 + self._damping * np.eye(self._block)
