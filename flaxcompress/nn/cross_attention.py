"""Attention of a decoder's tokens to the encoder's output."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from flaxcompress.config import ModelConfig
from flaxcompress.nn.attention import Core
from flaxcompress.nn.cache import LayerCache
from flaxcompress.nn.context import Context
from flaxcompress.nn.linear import Linear, project_together


class CrossAttention(nn.Module):
    """As `Attention`, keys and values from `context.memory` (Vaswani et al. 2017, §3.2.3).

    While decoding, the cache keeps the memory's keys and values from the call that had the memory on.
    """

    config: ModelConfig
    address: str

    @staticmethod
    def core_flops(config: ModelConfig, length: int) -> float:
        """Operations per token and layer beside the linear maps, at a source of `length` tokens."""
        return 4.0 * length * config.heads * config.head_dim

    def setup(self):
        config, address = self.config, self.address
        inner, shared = config.heads * config.head_dim, config.groups * config.head_dim
        self.query = Linear(config, f"{address}/query", config.width, inner, config.attention_bias)
        self.key = Linear(config, f"{address}/key", config.width, shared, config.attention_bias)
        self.value = Linear(config, f"{address}/value", config.width, shared, config.attention_bias)
        self.output = Linear(config, f"{address}/output", inner, config.width, config.output_bias)
        self.core = Core(config)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        *,
        cache: LayerCache | None = None,
        deterministic: bool = True,
        need_probabilities: bool = False,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B H T S"] | None, LayerCache | None]:
        heads = lambda y: y.reshape(*y.shape[:-1], -1, self.config.head_dim)  # noqa: E731
        query = heads(self.query(x))
        if context.memory is not None:
            key, value = map(heads, project_together(context.memory, (self.key, self.value)))
            if cache is not None:
                cache = cache.fill("cross_key", key).fill("cross_value", value)
        elif cache is not None:
            key, value = cache.read("cross_key", x.dtype), cache.read("cross_value", x.dtype)
        else:
            raise ValueError("cross-attention: there is neither the encoder's output nor a cache of it")
        need = {"deterministic": deterministic, "need_probabilities": need_probabilities}
        y, probabilities = self.core(query, key, value, context.memory_mask, **need)
        return self.output(y.reshape(*y.shape[:-2], -1)), probabilities, cache
