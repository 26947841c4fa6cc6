"""Which examples make up each batch of each epoch: a function of the seed alone, whatever number of processes reads."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from flaxcompress.data.packing import Bins, Packing

FILLER = -1  # a row without examples, which fills up an epoch's last batch


class Epoch(NamedTuple):
    """The batches of one epoch.

    Attributes:
      rows: the rows of each of K batches, or `FILLER`.
      buckets: which of the padded lengths each batch has.
      bins: the examples of every row; None: row i is example i.
    """

    rows: Int[np.ndarray, "K B"]
    buckets: Int[np.ndarray, " K"]
    bins: Bins | None


class Plan:
    """The batches of every epoch. All epochs have the same number of batches, so that any batch is found at once.

    A batch's rows are all of one bucket, except that what is left over of the buckets, less than a batch of each, is
    put together. Every example occurs once in an epoch.

    Args:
      buckets: of each row; or a `Packing`, whose rows are all of one.
      shuffle: whether epochs have orders of their own, drawn from (seed, epoch); else all have that of the examples.
    """

    def __init__(self, buckets: Sequence[int] | np.ndarray | Packing, *, batch_size: int, seed: int, shuffle: bool):
        if batch_size < 1:
            raise ValueError(f"batches: batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"batches: seed must be 0 or more, got {seed}")
        self._packing = buckets if isinstance(buckets, Packing) else None
        self._buckets = np.zeros(buckets.rows, np.int64) if isinstance(buckets, Packing) else np.asarray(buckets)
        if not len(self._buckets):
            raise ValueError("batches: there are no examples")
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        counts = np.bincount(self._buckets)
        self.batches = int((counts // batch_size).sum() - (-(counts % batch_size).sum() // batch_size))
        self._lock = threading.Lock()
        self._epoch = functools.lru_cache(maxsize=2)(self._draw)

    @property
    def rows(self) -> int:
        """Rows in an epoch."""
        return len(self._buckets)

    def epoch(self, number: int) -> Epoch:
        """The batches of one epoch; threads may ask at the same time."""
        with self._lock:
            return self._epoch(number if self.shuffle else 0)

    def _draw(self, number: int) -> Epoch:
        rng = np.random.default_rng([self.seed, number]) if self.shuffle else None
        bins = None if self._packing is None else self._packing.bins(rng)
        order = np.arange(self.rows) if rng is None else rng.permutation(self.rows)
        order = order[np.argsort(self._buckets[order], kind="stable")]
        whole, rest = [], []
        for group in np.split(order, np.cumsum(np.bincount(self._buckets))[:-1]):
            full = len(group) // self.batch_size * self.batch_size
            whole.append(group[:full])
            rest.append(group[full:])
        flat = np.concatenate(whole + rest)
        rows = np.full(self.batches * self.batch_size, FILLER)
        rows[: len(flat)] = flat
        rows = rows.reshape(self.batches, self.batch_size)
        buckets = np.where(rows == FILLER, 0, self._buckets[rows]).max(1)
        if rng is not None:
            mixed = rng.permutation(self.batches)
            rows, buckets = rows[mixed], buckets[mixed]
        elif bins is None:  # as near to the examples' order as buckets allow
            first = np.argsort(rows[:, 0], kind="stable")
            rows, buckets = rows[first], buckets[first]
        return Epoch(rows, buckets, bins)
