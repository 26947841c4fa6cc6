"""Masked language modelling: which tokens are hidden, and by what."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Integer


class Masked(NamedTuple):
    """A row with hidden tokens.

    Attributes:
      ids: the row, with masks, random tokens, or themselves in their places.
      positions: of the hidden tokens, ascending.
      labels: what stood there.
    """

    ids: Integer[np.ndarray, " T"]
    positions: Int[np.ndarray, " m"]
    labels: Integer[np.ndarray, " m"]


def masked_count(length: int, rate: float) -> int:
    """How many of `length` tokens are hidden: `rate` of them, rounded, at least one."""
    return max(1, int(length * rate + 0.5))


def ngram_shares(longest: int) -> np.ndarray:
    """How likely runs of 1, 2, … `longest` words are: in proportion to 1/n (Lan et al. 2020, §3.1)."""
    if longest < 1:
        raise ValueError(f"masking: ngram must be at least 1, got {longest}")
    weights = 1.0 / np.arange(1, longest + 1)
    return weights / weights.sum()


def choose_words(
    sizes: Int[np.ndarray, " words"],
    room: Int[np.ndarray, " words"],
    count: int,
    *,
    longest: int,
    rng: np.random.Generator,
) -> list[tuple[int, int]]:
    """Draws runs of words, (first word, number of words), until they have `count` tokens.

    Runs begin at words in random order, with lengths as `ngram_shares` says; they neither overlap nor leave their
    segment. A run that would have too many tokens is shortened, or left out: so where words are long, fewer tokens may
    be drawn, even none, but never more.

    Args:
      sizes: tokens of each word.
      room: how many words there are from each one to the end of its segment.
    """
    order = rng.permutation(len(sizes)).tolist()
    bounds = np.cumsum(ngram_shares(longest))[:-1]  # a random number lies beyond n - 1 of them for a run of n words
    lengths = (np.searchsorted(bounds, rng.random(len(sizes)), side="right") + 1).tolist()
    tokens, until = sizes.tolist(), room.tolist()
    taken = [False] * len(tokens)
    found: list[tuple[int, int]] = []
    for word, length in zip(order, lengths, strict=True):
        length = min(length, until[word])
        if any(taken[word : word + length]):
            continue
        while length and sum(tokens[word : word + length]) > count:
            length -= 1
        if not length:
            continue
        found.append((word, length))
        taken[word : word + length] = [True] * length
        count -= sum(tokens[word : word + length])
        if not count:
            break
    return found


def word_spans(starts: Bool[np.ndarray, " T"], inside: Integer[np.ndarray, " T"]) -> tuple[np.ndarray, ...]:
    """(first tokens, sizes, room) of the words of a row, as `choose_words` wants them.

    Args:
      starts: whether a token begins a word.
      inside: the number of each token's segment, from 1; 0 for special tokens, which belong to no word.
    """
    real = inside > 0
    first, last = real & starts, real.copy()
    first[0], last[-1] = real[0], real[-1]
    first[1:] |= real[1:] & (inside[1:] != inside[:-1])
    last[:-1] &= first[1:] | ~real[1:]
    begins = np.flatnonzero(first)
    sizes = np.flatnonzero(last) - begins + 1
    segments = inside[begins]
    after = np.searchsorted(segments, segments, side="right")  # segments are numbered in their order
    return begins, sizes, after - np.arange(len(begins))


def mask_row(
    ids: Integer[np.ndarray, " T"],
    starts: Bool[np.ndarray, " T"],
    inside: Integer[np.ndarray, " T"],
    *,
    mask: int,
    replacements: Integer[np.ndarray, " n"],
    rate: float,
    longest: int,
    rng: np.random.Generator,
) -> Masked:
    """Hides a share of a row: 80 % of its tokens become `mask`, 10 % random ones, 10 % stay (Devlin et al. 2019).

    Args:
      starts: whether a token begins a word; all true to hide single tokens.
      inside: segments, see `word_spans`.
      replacements: the ids that random tokens are drawn from.
      rate: the share of tokens that is hidden, see `masked_count`.
      longest: the most words in a row that are hidden together.
    """
    begins, sizes, room = word_spans(starts, inside)
    count = masked_count(int((inside > 0).sum()), rate)
    runs = choose_words(sizes, room, count, longest=longest, rng=rng)
    parts = [np.arange(begins[w], begins[w + n - 1] + sizes[w + n - 1]) for w, n in runs]
    positions = np.sort(np.concatenate(parts)) if parts else np.zeros(0, np.int64)
    labels = ids[positions]
    draw = rng.random(len(positions))
    random_ids = replacements[rng.integers(len(replacements), size=len(positions))]
    hidden = ids.copy()
    hidden[positions] = np.where(draw < 0.8, mask, np.where(draw < 0.9, random_ids, labels))
    return Masked(hidden, positions, labels)
