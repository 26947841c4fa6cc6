"""Batches cut into blocks, two of them computed at a time: how a CPU gets through a large batch sooner.

XLA computes what lies between matrix products (transposes, norms, softmax) mostly on one core, and a large batch's
activations leave the cache between two operations: 375 ms against 430 for 32×128 tokens of all-MiniLM-L6-v2, two cores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from flaxcompress.machine import cores

_WORKERS = 2
_TOKENS = 512  # of one block


def block_rows(rows: int, length: int) -> int | None:
    """How many of a batch's rows make a block, [rows, length] tokens in all; None where one piece is as good."""
    if jax.default_backend() != "cpu" or cores() < _WORKERS or rows % _WORKERS:
        return None
    each = rows // _WORKERS
    most = max(1, _TOKENS // length)
    if each * length <= _TOKENS:
        return None
    found = max(n for n in range(1, most + 1) if each % n == 0)
    return found if 2 * found > most else None  # a batch of 2·37 rows has no good blocks


def by_blocks(function: Callable[..., Any], rows: int) -> Callable[..., Any]:
    """`function` of arrays whose first axis is the batch, as a loop over blocks of `rows`; to be traced."""

    def run(*arrays: Any) -> Any:
        cut = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), arrays)
        out = jax.lax.map(lambda block: function(*block), cut)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)

    return run


def side_by_side(function: Callable[..., Any], *arrays: Any) -> Any:
    """A compiled `function` of arrays whose first axis is the batch, run on its halves at once."""
    half = next(x for x in jax.tree.leaves(arrays)).shape[0] // _WORKERS
    parts = [jax.tree.map(lambda x, i=i: x[i * half : (i + 1) * half], arrays) for i in range(_WORKERS)]
    done = list(_pool().map(lambda part: jax.block_until_ready(function(*part)), parts))
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *done)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_WORKERS, thread_name_prefix="flaxcompress")
