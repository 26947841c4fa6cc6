"""Sentence order prediction: are two segments in order, or swapped? (Lan et al. 2020, §3.1)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from flaxcompress.data.chunks import Chunks
from flaxcompress.data.tokens import Tokens

IN_ORDER, SWAPPED, NO_PAIR = 0, 1, -100

Span = tuple[int, int]  # the first token of a segment and the one after its last


def inner_borders(tokens: Tokens, chunks: Chunks) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Which of `tokens.units` begin inside each chunk, not at its start: from the first value up to the second one."""
    first = np.searchsorted(tokens.units, chunks.starts, side="right")
    return first, np.searchsorted(tokens.units, chunks.stops, side="left")


def split_pair(
    start: int, stop: int, borders: Int[np.ndarray, " n"], rng: np.random.Generator
) -> tuple[Span, Span, int]:
    """Two consecutive segments of a chunk, cut at one of its inner borders, and the label; swapped half of the time.

    Raises ValueError without a border: there are no two segments.
    """
    if not len(borders):
        raise ValueError("sentence order: a chunk of one unit has no two segments")
    cut = int(borders[rng.integers(len(borders))])
    before, after = (start, cut), (cut, stop)
    return (after, before, SWAPPED) if rng.random() < 0.5 else (before, after, IN_ORDER)
