"""Span corruption: runs of tokens are taken out of the input, and told in the target (Raffel et al. 2020, §3.3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Integer


class SpanCounts(NamedTuple):
    """How a stretch of tokens is corrupted; it depends on its length alone.

    Attributes:
      noise: tokens taken out.
      spans: in how many runs.
      inputs: tokens of the input: the others, a sentinel for each run, and the end.
      targets: tokens of the target: a sentinel before each run, the runs, and the end.
    """

    noise: int
    spans: int
    inputs: int
    targets: int


def span_counts(length: int, *, density: float = 0.15, mean_span: float = 3.0) -> SpanCounts:
    """Counts for `length` tokens. Raises ValueError for fewer than 2, of which none could be left."""
    if length < 2:
        raise ValueError(f"span corruption: at least 2 tokens are needed, got {length}")
    noise = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(noise / mean_span), 1), noise, length - noise)
    return SpanCounts(noise, spans, length - noise + spans + 1, noise + spans + 1)


def longest_stretch(inputs: int, *, density: float = 0.15, mean_span: float = 3.0) -> int:
    """The most tokens whose corrupted input has at most `inputs` tokens. Raises ValueError where 2 are too many."""
    length = 2
    if span_counts(2, density=density, mean_span=mean_span).inputs > inputs:
        raise ValueError(f"span corruption: a length of {inputs} is too short, give 3 or more")
    while span_counts(length + 1, density=density, mean_span=mean_span).inputs <= inputs:
        length += 1
    return length


def _parts(total: int, count: int, rng: np.random.Generator) -> Int[np.ndarray, " count"]:
    """`total` things cut into `count` parts of one or more, all ways being equally likely."""
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def noise_mask(length: int, counts: SpanCounts, rng: np.random.Generator) -> Bool[np.ndarray, " length"]:
    """Which tokens are taken out: runs, each after one or more tokens that stay."""
    runs = np.stack([_parts(length - counts.noise, counts.spans, rng), _parts(counts.noise, counts.spans, rng)], 1)
    return np.repeat(np.tile([False, True], counts.spans), runs.reshape(-1))


def corrupt(
    ids: Integer[np.ndarray, " n"], noise: Bool[np.ndarray, " n"], sentinels: Sequence[int], end: int
) -> tuple[Int[np.ndarray, " inputs"], Int[np.ndarray, " targets"]]:
    """(input, target): run i of `noise` becomes sentinel i in the input; the target has that and then the run.

    Raises ValueError for more runs than sentinels.
    """
    begins = noise & ~np.concatenate([[False], noise[:-1]])
    runs = int(begins.sum())
    if runs > len(sentinels):
        raise ValueError(f"span corruption: {runs} spans, but the tokenizer has {len(sentinels)} sentinels")
    marks = np.asarray(sentinels[:runs], np.int64)
    inputs = ids.astype(np.int64)
    inputs[begins] = marks
    inputs = inputs[begins | ~noise]
    places = np.cumsum(noise)[begins] - 1  # of each run's first token among those taken out
    targets = np.insert(ids[noise].astype(np.int64), places, marks)
    return np.append(inputs, end), np.append(targets, end)
