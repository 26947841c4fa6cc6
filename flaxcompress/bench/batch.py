"""The inputs that every contestant gets."""

from __future__ import annotations

import numpy as np

_LATENCY_LENGTH = 32  # tokens of the batch-1 call: a sentence


def make_batch(*, batch: int, length: int, vocabulary: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random ids [B, T] and their mask [B, T]: the first row is full, the others hold T/2 … T tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(max(1, length // 2), length + 1, batch)
    lengths[0] = length
    mask = np.arange(length) < lengths[:, None]
    return np.where(mask, rng.integers(0, vocabulary, (batch, length)), 0).astype(np.int32), mask


def make_single(vocabulary: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of one sentence, for the latency."""
    return make_batch(batch=1, length=min(length, _LATENCY_LENGTH), vocabulary=vocabulary, seed=seed)
