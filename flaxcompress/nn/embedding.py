"""Token, position and segment embeddings, normalised (Devlin et al. 2019, figure 2)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from flaxcompress.config import ModelConfig
from flaxcompress.formats import spec_for, take
from flaxcompress.nn.add_norm import LayerNorm
from flaxcompress.nn.linear import weight


class Embedding(nn.Module):
    """[B, T] ids -> [B, T, D] in `dtype`; `vectors` stand in for the token table's rows when given.

    Ids outside a table read its nearest row; `Model` checks them beforehand.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        config = self.config

        def table(name, rows):
            spec = spec_for(config, f"embedding/{name}")
            initializer = nn.initializers.normal(config.initializer_range)
            return weight(self, name, lambda key: spec.init(key, (rows, config.width), initializer, table=True))

        self.token = table("token", config.vocabulary)
        self.position = table("position", config.positions)
        self.segment = table("segment", config.segments) if config.segments else None
        self.norm = LayerNorm(config, "embedding/norm", self.dtype)
        self.drop = nn.Dropout(config.dropout)

    def __call__(
        self,
        ids: Integer[Array, "B T"],
        segments: Integer[Array, "B T"] | None = None,
        *,
        deterministic: bool = True,
        vectors: Float[Array, "B T D"] | None = None,
    ) -> Float[Array, "B T D"]:
        x = take(self.token, ids) if vectors is None else vectors
        x = x + take(self.position, jnp.arange(ids.shape[1]))
        if self.segment is not None:
            x = x + take(self.segment, jnp.zeros_like(ids) if segments is None else segments)
        return self.drop(self.norm(x), deterministic=deterministic)
