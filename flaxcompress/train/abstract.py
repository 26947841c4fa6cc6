"""The arrays of a training run without their values: what its step is compiled for ahead of time."""

from __future__ import annotations

import math
from typing import Any

import jax

from flaxcompress import tree
from flaxcompress.config import ModelConfig
from flaxcompress.model import abstract_flat
from flaxcompress.train.trainable import thaw_matching


def abstract_params(config: ModelConfig, pattern: str = ".*") -> Any:
    """The parameters as they are trained where the pattern matches (see `thaw_model`)."""
    flat = abstract_flat(config)
    return tree.unflatten(
        {a: jax.eval_shape(lambda node, a=a: thaw_matching(node, a, pattern), node) for a, node in flat.items()}
    )


def placed(arrays: Any, shardings: Any) -> Any:
    """Abstract arrays that know where they are."""
    one = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(one, arrays, shardings)


def count(params: Any) -> int:
    """How many numbers a tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def shard_bytes(arrays: Any) -> int:
    """Bytes of placed arrays on one device."""
    size = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize  # noqa: E731
    return sum(map(size, jax.tree.leaves(arrays)))
