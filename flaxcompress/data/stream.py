"""Batches for distillation: sentences and fragments of sentences, a pure function of seed and step."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from flaxcompress.text import pad_ids

_LENGTHS = (16, 24, 32, 64, 128)
_CHUNK = 16  # batches that are sorted by length together


class FragmentStream:
    """Endless batches of token ids: step -> (ids [B, T] int32, mask [B, T] bool).

    A share `whole` of the sentences is used as it is, the rest is cut into fragments of 6 to 22 tokens: short texts are
    what sentence encoders often see, and they cost less. Neighbours are sorted by length, to pad little.

    Args:
      rows: token ids of sentences, special tokens included (the first and last are put around fragments too).
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        *,
        batch: int,
        pad: int,
        seed: int,
        whole: float = 0.4,
        max_length: int = 64,
    ):
        self._rows = [list(row) for row in rows]
        self._batch, self._pad, self._seed = batch, pad, seed
        self._whole, self._max_length = whole, max_length
        if not self._rows:
            raise ValueError("no sentences to train on")

    @functools.lru_cache(maxsize=2)  # noqa: B019  (a stream lives as long as its training run)
    def _epoch(self, number: int) -> list[list[list[int]]]:
        rng = np.random.default_rng([self._seed, number])
        pool: list[list[int]] = []
        for row in self._rows:
            first, body, last = row[:1], row[1:-1][: self._max_length - 2], row[-1:]
            if rng.random() < self._whole:
                pool.append(first + body + last)
                continue
            start = 0
            while start < len(body):
                size = int(rng.integers(6, 23))
                part = body[start : start + size]
                start += size
                if len(part) >= 4 or len(body) < 4:
                    pool.append(first + part + last)
        order = rng.permutation(len(pool))
        if len(order) < self._batch:
            order = np.resize(order, self._batch)
        batches = []
        for begin in range(0, len(order) - self._batch + 1, self._batch * _CHUNK):
            chunk = sorted(order[begin : begin + self._batch * _CHUNK], key=lambda i: len(pool[i]))
            groups = [chunk[k : k + self._batch] for k in range(0, len(chunk) - self._batch + 1, self._batch)]
            batches += [[pool[i] for i in groups[k]] for k in rng.permutation(len(groups))]
        return batches

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The batch of one step."""
        epoch = 0
        while step >= len(batches := self._epoch(epoch)):
            step -= len(batches)
            epoch += 1
        rows = batches[step]
        longest = max(len(row) for row in rows)
        length = next((n for n in _LENGTHS if n >= longest), longest)
        return pad_ids(rows, length, self._batch, self._pad)
