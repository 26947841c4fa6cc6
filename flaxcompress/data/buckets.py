"""Length buckets: the few lengths that batches are padded to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

_MULTIPLE = 8


def bucket_lengths(length: int, count: int = 4) -> tuple[int, ...]:
    """`count` lengths up to `length`, evenly apart, rounded up to a multiple of 8 (each costs a compilation)."""
    if length < 1 or count < 1:
        raise ValueError(f"length buckets: length and their number must be at least 1, got {length} and {count}")
    rounded = {-(-length * i // (count * _MULTIPLE)) * _MULTIPLE for i in range(1, count)}
    return (*sorted(n for n in rounded if n < length), length)


def find_buckets(lengths: Int[np.ndarray, " n"], buckets: Sequence[int]) -> Int[np.ndarray, " n"]:
    """The number of the smallest bucket that each length fits into. Raises ValueError where one fits into none."""
    if list(buckets) != sorted(set(buckets)) or not len(buckets):
        raise ValueError(f"length buckets: must be ascending lengths, got {list(buckets)}")
    if len(lengths) and (longest := int(np.max(lengths))) > buckets[-1]:
        raise ValueError(f"length buckets: an example has {longest} tokens, but the longest bucket has {buckets[-1]}")
    return np.searchsorted(np.asarray(buckets), lengths)


def make_buckets(length: int, buckets: int | Sequence[int]) -> tuple[int, ...]:
    """The padded lengths from a number of them, or from a list that ends with `length`."""
    if isinstance(buckets, int):
        return bucket_lengths(length, buckets)
    if not len(buckets) or buckets[-1] != length:
        raise ValueError(f"length buckets: the longest must be the length {length}, got {list(buckets)}")
    find_buckets(np.zeros(0, np.int64), buckets)
    return tuple(buckets)
