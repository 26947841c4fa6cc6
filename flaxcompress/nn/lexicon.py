"""Vectors of a lexicon's terms, added to token embeddings through a gate."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from flaxcompress.config import ModelConfig
from flaxcompress.formats import spec_for, take
from flaxcompress.nn.linear import Linear, weight
from flaxcompress.nn.logical import put_together


class LexiconFusion(nn.Module):
    """x + σ(W[x; e] + b) · e with e = P·v, v the vector of the token's term; x itself, bit for bit, where it has none.

    P starts as zeros, so that a new lexicon changes nothing.
    """

    config: ModelConfig

    def setup(self):
        config, lexicon, width = self.config, self.config.lexicon, self.config.table_width
        assert lexicon is not None
        spec, initializer = spec_for(config, "embedding/lexicon/table"), nn.initializers.normal(1.0)
        shape = (lexicon.entries, lexicon.width)
        self.table = weight(self, "table", lambda key: spec.init(key, shape, initializer, table=True))
        self.projection = Linear(
            config, "embedding/lexicon/projection", lexicon.width, width, False, nn.initializers.zeros_init()
        )
        self.gate = Linear(config, "embedding/lexicon/gate", 2 * width, width)

    def __call__(self, x: Float[Array, "B T E"], features: Integer[Array, "B T"]) -> Float[Array, "B T E"]:
        table = put_together(self.config, "embedding/lexicon/table", self.table)
        added = self.projection(take(table, jnp.maximum(features - 1, 0)))
        gate = jax.nn.sigmoid(self.gate(jnp.concatenate([x, added], -1)))
        return jnp.where((features > 0)[..., None], x + gate * added, x)
