"""A learned bias on attention scores by relative position, shared by all layers (Raffel et al. 2020, §2.1)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flaxcompress.config import ModelConfig
from flaxcompress.formats import spec_for, take
from flaxcompress.nn.linear import weight


def relative_buckets(queries: int, keys: int, *, buckets: int, distance: int) -> np.ndarray:
    """The bucket [T, S] of every offset key - query: half for each direction, near offsets one by one, then log-wide.

    Offsets up to a quarter of the buckets have one each; the others share by log(offset), up to `distance`.
    """
    offset = np.arange(keys)[None, :] - np.arange(queries)[:, None]
    half = buckets // 2
    near = half // 2
    away = np.abs(offset)
    far = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(near)) / np.float32(np.log(distance / near))
    far = np.minimum(near + (far * np.float32(half - near)).astype(np.int32), half - 1)
    return np.where(offset > 0, half, 0) + np.where(away < near, away, far)


class RelativeBias(nn.Module):
    """The bias [H, T, T] of a sequence of `length` tokens."""

    config: ModelConfig

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "H T T"]:
        config = self.config
        spec, normal = spec_for(config, "relative_bias/table"), nn.initializers.normal(config.initializer_range)
        shape = (config.relative_buckets, config.heads)
        table = weight(self, "table", lambda key: spec.init(key, shape, normal, table=True))
        buckets = relative_buckets(length, length, buckets=config.relative_buckets, distance=config.relative_distance)
        return take(table, jnp.asarray(buckets)).transpose(2, 0, 1)
