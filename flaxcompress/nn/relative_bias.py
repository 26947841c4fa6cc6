"""A learned bias on attention scores by relative position, shared by all layers (Raffel et al. 2020, §2.1)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from flaxcompress.config import ModelConfig
from flaxcompress.formats import spec_for, take
from flaxcompress.nn.initializer import table_initializer
from flaxcompress.nn.linear import weight


def distance_buckets(buckets: int, distance: int) -> np.ndarray:
    """The bucket of the distances 0 … `distance`, from which on all share the last: near ones alone, then log-wide.

    Distances up to half of the buckets have one each; the others share by log(distance).
    """
    near = buckets // 2
    away = np.arange(distance + 1)
    far = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(near)) / np.float32(np.log(distance / near))
    far = np.minimum(near + (far * np.float32(buckets - near)).astype(np.int32), buckets - 1)
    return np.where(away < near, away, far)


def relative_buckets(
    queries: Integer[Array, " T"], keys: Integer[Array, " S"], *, buckets: int, distance: int, causal: bool = False
) -> Integer[Array, "T S"]:
    """The bucket of every offset key - query, by their places; half of them for each direction unless `causal`."""
    offset = keys[None, :] - queries[:, None]
    if causal:
        return jnp.asarray(distance_buckets(buckets, distance))[jnp.clip(-offset, 0, distance)]
    near = jnp.asarray(distance_buckets(buckets // 2, distance))[jnp.minimum(jnp.abs(offset), distance)]
    return jnp.where(offset > 0, buckets // 2, 0) + near


class RelativeBias(nn.Module):
    """The bias [H, T, S] of queries and keys by their places in the sequence."""

    config: ModelConfig
    prefix: str = ""

    @nn.compact
    def __call__(self, queries: Integer[Array, " T"], keys: Integer[Array, " S"]) -> Float[Array, "H T S"]:
        config = self.config
        address, normal = f"{self.prefix}relative_bias/table", table_initializer(config)
        spec, shape = spec_for(config, address), (config.relative_buckets, config.heads)
        table = weight(self, "table", lambda key: spec.init(key, shape, normal, table=True))
        sizes = {"buckets": config.relative_buckets, "distance": config.relative_distance}
        return take(table, relative_buckets(queries, keys, **sizes, causal=config.causal)).transpose(2, 0, 1)
