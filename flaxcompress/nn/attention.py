"""Multi-head self-attention."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
from jaxtyping import Array, Float

from flaxcompress.config import ModelConfig
from flaxcompress.nn.add_norm import Norm
from flaxcompress.nn.cache import LayerCache, is_ring
from flaxcompress.nn.context import Context
from flaxcompress.nn.depthwise import Depthwise, lead
from flaxcompress.nn.linear import Linear, project_together
from flaxcompress.nn.logical import constrain
from flaxcompress.nn.prefix import Prefix
from flaxcompress.ops import attend_values, attention_probabilities, dot_product_attention, rotate

PROJECTIONS = "projections"  # the collection in which a forward pass keeps queries, keys and values


class Projections(NamedTuple):
    """What attention multiplies: queries and keys as scores see them, after norms and rotary positions, and values."""

    query: Float[Array, "*L B T H d"]
    key: Float[Array, "*L B S K d"]
    value: Float[Array, "*L B S K e"]


def keep_projections(module: nn.Module, query, key, value) -> None:
    """Keeps a layer's queries, keys and values when the caller made their collection mutable; nothing otherwise."""
    found = Projections(query, key, value)
    module.sow(PROJECTIONS, "all", found, init_fn=lambda: found, reduce_fn=lambda _, new: new)


class Core(nn.Module):
    """softmax(QKᵀ)V with dropout on the probabilities, and the probabilities [B, H, T, S] when asked for.

    Attributes:
      scale: of the scores; None for the config's.
    """

    config: ModelConfig
    scale: float | None = None

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
        query = constrain(query, "batch", "length", "heads", None)
        key, value = (constrain(x, "batch", None, "kv_heads", None) for x in (key, value))
        rate = self.config.attention_dropout
        scale = self.config.attention_scale if self.scale is None else self.scale
        if need_probabilities or (not deterministic and rate > 0):
            probabilities = attention_probabilities(query, key, mask, bias, scale=scale)
            dropped = nn.Dropout(rate, name="drop")(probabilities, deterministic=deterministic)
            return attend_values(dropped, value), probabilities if need_probabilities else None
        return dot_product_attention(query, key, value, mask, bias, scale=scale), None


class Attention(nn.Module):
    """[B, T, D] -> [B, T, D], the probabilities [B, H, T, S] when asked for, and the cache with the tokens stored.

    A prefix stands before the keys of the sequence, in the probabilities too: [B, H, T, P + S].

    Vaswani et al. 2017, §3.2; K heads of keys and values serve H query heads (Ainslie et al. 2023).
    """

    config: ModelConfig
    address: str

    @staticmethod
    def cache_arrays(config: ModelConfig) -> dict[str, tuple[int, int]]:
        """What the cache keeps of a token: {name: (heads, width)}."""
        return {"key": (config.groups, config.query_key_dim), "value": (config.groups, config.head_dim)}

    @staticmethod
    def stages(config: ModelConfig) -> list[tuple[str, ...]]:
        """The linear maps in the order in which they are used; those of a stage read the same input."""
        into = [("query",), ("key",), ("value",)] if config.projection_kernel else [("query", "key", "value")]
        return [*into, ("output",)]

    @staticmethod
    def core_flops(config: ModelConfig, length: int) -> float:
        """Operations per token and layer beside the linear maps, at `length` tokens."""
        return 2.0 * (config.prefix_length + length) * config.heads * (config.query_key_dim + config.head_dim)

    def setup(self):
        config, address = self.config, self.address
        width, scored, inner = config.width, config.query_key_dim, config.heads * config.head_dim
        self.query = Linear(config, f"{address}/query", width, config.heads * scored, config.attention_bias)
        self.key = Linear(config, f"{address}/key", width, config.groups * scored, config.attention_bias)
        self.value = Linear(config, f"{address}/value", width, config.groups * config.head_dim, config.attention_bias)
        self.output = Linear(config, f"{address}/output", inner, width, config.output_bias)
        if kernel := config.projection_kernel:
            self.query_depthwise = Depthwise(config, f"{address}/query_depthwise", kernel, width)
            self.key_depthwise = Depthwise(config, f"{address}/key_depthwise", kernel, width)
            self.value_depthwise = Depthwise(config, f"{address}/value_depthwise", kernel, width)
        if config.query_key_norm:
            self.query_norm = Norm(config, f"{address}/query_norm")
            self.key_norm = Norm(config, f"{address}/key_norm")
        if config.prefix_length:
            self.prefix = Prefix(config, f"{address}/prefix")
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
        parts, cache = self._project(x, context, cache)
        query, key = (p.reshape(*p.shape[:-1], -1, config.query_key_dim) for p in parts[:2])
        value = parts[2].reshape(*parts[2].shape[:-1], -1, config.head_dim)
        if config.query_key_norm:
            query, key = self.query_norm(query).astype(x.dtype), self.key_norm(key).astype(x.dtype)
        if context.rotation is not None:
            query, key = rotate(query, *context.rotation), rotate(key, *context.rotation)
        keep_projections(self, query, key, value)
        if cache is not None:
            seen, cache = cache.extend({"key": key, "value": value}, ring=is_ring(config))
            key, value = seen["key"], seen["value"]
        if config.prefix_length:
            key, value, context = self.prefix(key, value, context)
        need = {"deterministic": deterministic, "need_probabilities": need_probabilities}
        y, probabilities = self.mix(query, key, value, context, **need)
        return self.output(y.reshape(*y.shape[:-2], -1)), probabilities, cache

    def _project(self, x: Float[Array, "B T D"], context: Context, cache: LayerCache | None):
        """Queries, keys and values, [B, T, heads·width] each, and the cache."""
        maps = (self.query, self.key, self.value)
        if not self.config.projection_kernel:
            return project_together(x, maps), cache
        x, before, cache = lead(x, "projection_inputs", context, cache)
        convolved = (self.query_depthwise, self.key_depthwise, self.value_depthwise)
        return [linear(each(x, before)) for linear, each in zip(maps, convolved, strict=True)], cache

    def mix(
        self,
        query: Float[Array, "B T H r"],
        key: Float[Array, "B S K r"],
        value: Float[Array, "B S K d"],
        context: Context,
        **need: bool,
    ) -> tuple[Float[Array, "B T H d"], Float[Array, "B H T S"] | None]:
        """What tokens take from the values, and the probabilities when asked for."""
        return self.core(query, key, value, context.mask, context.bias, **need)
