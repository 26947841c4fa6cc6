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


class Core(nn.Module):
    """softmax(QKᵀ)V with dropout on the probabilities, and the probabilities [B, H, T, S] when asked for."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        query: Float[Array, "B T H d"],
        key: Float[Array, "B S K d"],
        value: Float[Array, "B S K e"],
        mask,
        bias=None,
        *,
        deterministic: bool,
        need_probabilities: bool,
    ) -> tuple[Float[Array, "B T H e"], Float[Array, "B H T S"] | None]:
        rate, scale = self.config.attention_dropout, self.config.attention_scale
        if need_probabilities or (not deterministic and rate > 0):
            probabilities = attention_probabilities(query, key, mask, bias, scale=scale)
            dropped = nn.Dropout(rate, name="drop")(probabilities, deterministic=deterministic)
            return attend_values(dropped, value), probabilities if need_probabilities else None
        return dot_product_attention(query, key, value, mask, bias, scale=scale), None


class Attention(nn.Module):
    """[B, T, D] -> [B, T, D], the probabilities [B, H, T, S] when asked for, and the cache with the tokens stored.

    Vaswani et al. 2017, §3.2; K heads of keys and values serve H query heads (Ainslie et al. 2023).
    """

    config: ModelConfig
    address: str

    @staticmethod
    def cache_arrays(config: ModelConfig) -> dict[str, tuple[int, int]]:
        """What the cache keeps of a token: {name: (heads, width)}."""
        return {"key": (config.groups, config.head_dim), "value": (config.groups, config.head_dim)}

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
        self.core = Core(config)

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
            new = cache.store("key", key).store("value", value)
            if is_ring(config) and x.shape[1] > 1:  # the tokens may push out what their first ones still see
                key = jnp.concatenate([cache.read("key", key.dtype), key], 1)
                value = jnp.concatenate([cache.read("value", value.dtype), value], 1)
            else:
                key, value = new.read("key", key.dtype), new.read("value", value.dtype)
            cache = new
        need = {"deterministic": deterministic, "need_probabilities": need_probabilities}
        y, probabilities = self.core(query, key, value, context.mask, context.bias, **need)
        return self.output(y.reshape(*y.shape[:-2], -1)), probabilities, cache
