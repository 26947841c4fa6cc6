"""Token, position and segment embeddings, summed (Devlin et al. 2019, figure 2)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from flaxcompress.config import ModelConfig
from flaxcompress.formats import spec_for, take
from flaxcompress.nn.add_norm import Norm
from flaxcompress.nn.initializer import table_initializer
from flaxcompress.nn.lexicon import LexiconFusion
from flaxcompress.nn.linear import Linear, weight
from flaxcompress.nn.logical import put_together


def sinusoids(places: Integer[Array, "*B"], width: int) -> Float[Array, "*B E"]:
    """sin(p/10000^(2i/E)) for i < E/2, then the cosines (Vaswani et al. 2017, §3.5, the columns in another order)."""
    frequency = 10_000.0 ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    angles = places[..., None].astype(jnp.float32) * frequency.astype(np.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles[..., : width // 2])], -1)


class Embedding(nn.Module):
    """[B, T] ids -> [B, T, D] in `dtype`; `vectors` stand in for the token table's rows when given.

    A config without a vocabulary has no token table and always needs them. Ids outside a table read its nearest row;
    `Model` checks them beforehand.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    prefix: str = ""

    def setup(self):
        config = self.config

        def table(name, rows):
            spec = spec_for(config, f"{self.prefix}embedding/{name}")
            initializer = table_initializer(config)
            return weight(self, name, lambda key: spec.init(key, (rows, config.table_width), initializer, table=True))

        if config.vocabulary:
            self.token = table("token", config.vocabulary)
        if config.position_embedding == "learned":
            self.position = table("position", config.positions + config.prefix_length + config.position_offset)
        self.segment = table("segment", config.segments) if config.segments else None
        self.norm = Norm(config, f"{self.prefix}embedding/norm", self.dtype) if config.embedding_norm else None
        self.lexicon = None if config.lexicon is None else LexiconFusion(config)
        if config.embedding_width is not None:
            self.projection = Linear(config, f"{self.prefix}embedding/projection", config.table_width, config.width)
        self.drop = nn.Dropout(config.dropout)

    def used(self, name: str) -> Any:
        """A table as look-ups and a tied head need it (see `put_together`)."""
        return put_together(self.config, f"{self.prefix}embedding/{name}", getattr(self, name))

    def __call__(
        self,
        ids: Integer[Array, "B T"],
        segments: Integer[Array, "B T"] | None = None,
        *,
        positions: Integer[Array, "B T"] | None = None,
        deterministic: bool = True,
        vectors: Float[Array, "B T E"] | None = None,
        features: Integer[Array, "B T"] | None = None,
        first: Integer[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """`positions` are 0, 1, 2, … behind a prefix when not given; `features` (see `Lexicon`) 0.

        `first` is where in its row a token's document begins, where there are several.
        """
        config = self.config
        x = take(self.used("token"), ids) if vectors is None else vectors
        x = x if config.embedding_scale == 1.0 else x * config.embedding_scale
        if config.position_embedding != "none":
            places = config.prefix_length + jnp.arange(ids.shape[1]) if positions is None else positions
            if config.position_offset:
                real = ids != config.pad_token
                count = jnp.cumsum(real, axis=1)
                if first is not None:
                    count = count - jnp.take_along_axis(count - real, first, axis=1)
                places = jnp.where(real, count + config.prefix_length, 0) + config.position_offset - 1
            learned = config.position_embedding == "learned"
            x = x + (take(self.used("position"), places) if learned else sinusoids(places, config.table_width))
        if self.segment is not None:
            x = x + take(self.used("segment"), jnp.zeros_like(ids) if segments is None else segments)
        if self.lexicon is not None and (features is not None or self.is_initializing()):
            x = self.lexicon(x, jnp.zeros_like(ids) if features is None else features)
        x = x if self.norm is None else self.norm(x)
        x = self.drop(x.astype(self.dtype), deterministic=deterministic)
        return x if config.embedding_width is None else self.projection(x)
