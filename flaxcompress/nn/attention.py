"""Multi-head self-attention."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxcompress.config import ModelConfig
from flaxcompress.nn.add_norm import Norm
from flaxcompress.nn.cache import LayerCache, is_ring
from flaxcompress.nn.context import Context
from flaxcompress.nn.linear import Linear, project_together
from flaxcompress.ops import attend_values, attention_probabilities, dot_product_attention, rotate


class Attention(nn.Module):
    """[B, T, D] -> [B, T, D], the probabilities [B, H, T, S] when asked for, and the cache with the tokens stored.

    Vaswani et al. 2017, §3.2; K heads of keys and values serve H query heads (Ainslie et al. 2023).
    """

    config: ModelConfig
    address: str

    def setup(self):
        config, address = self.config, self.address
        inner, shared = config.heads * config.head_dim, config.groups * config.head_dim
        self.query = Linear(config, f"{address}/query", config.width, inner, config.attention_bias)
        self.key = Linear(config, f"{address}/key", config.width, shared, config.attention_bias)
        self.value = Linear(config, f"{address}/value", config.width, shared, config.attention_bias)
        self.output = Linear(config, f"{address}/output", inner, config.width, config.output_bias)
        if config.query_key_norm:
            self.query_norm = Norm(config, f"{address}/query_norm")
            self.key_norm = Norm(config, f"{address}/key_norm")
        self.drop = nn.Dropout(config.attention_dropout)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context = Context(),  # noqa: B008  (a tuple, never changed)
        *,
        cache: LayerCache | None = None,
        deterministic: bool = True,
        need_probabilities: bool = False,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B H T S"] | None, LayerCache | None]:
        config = self.config
        parts = project_together(x, (self.query, self.key, self.value))
        query, key, value = (p.reshape(*p.shape[:-1], -1, config.head_dim) for p in parts)
        if config.query_key_norm:
            query, key = self.query_norm(query).astype(x.dtype), self.key_norm(key).astype(x.dtype)
        if context.rotation is not None:
            query, key = rotate(query, *context.rotation), rotate(key, *context.rotation)
        if cache is not None:
            ring = is_ring(config)
            new = cache.store("key", key, context.slots, wraps=ring).store("value", value, context.slots, wraps=ring)
            if ring and x.shape[1] > 1:  # the tokens may push out what their first ones still see
                key = jnp.concatenate([cache.read("key", key.dtype), key], 1)
                value = jnp.concatenate([cache.read("value", value.dtype), value], 1)
            else:
                key, value = new.read("key", key.dtype), new.read("value", value.dtype)
            cache = new
        dropping = not deterministic and config.attention_dropout > 0
        if dropping or need_probabilities:
            probabilities = attention_probabilities(query, key, context.mask, context.bias)
            dropped = self.drop(probabilities, deterministic=deterministic)
            y = attend_values(dropped, value)
        else:
            probabilities = None
            y = dot_product_attention(query, key, value, context.mask, context.bias)
        y = self.output(y.reshape(*y.shape[:-2], -1))
        return y, probabilities if need_probabilities else None, cache
