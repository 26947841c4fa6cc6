"""Multi-head latent attention (DeepSeek-V2, 2024, §2.1)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxcompress.config import Latent, ModelConfig
from flaxcompress.nn.add_norm import Norm
from flaxcompress.nn.attention import Core, keep_projections
from flaxcompress.nn.cache import LayerCache, is_ring
from flaxcompress.nn.context import Context
from flaxcompress.nn.linear import Linear, project_together
from flaxcompress.ops import rotate


def latent_of(config: ModelConfig) -> Latent:
    """The config's kind of attention."""
    assert isinstance(config.attention, Latent)
    return config.attention


class LatentAttention(nn.Module):
    """As `Attention`: keys and values are expanded from one latent c of width R per token, beside a key k of all heads.

    Head h scores (q_h, p_h)·(K_h c, k), p and k with rotary positions, and sums V_h c. While decoding, the cache has c
    and k alone; the maps K_h and V_h are then moved to the queries and to the result, (K_hᵀ q_h)·c and V_h (Σ a c),
    where that is less work than expanding all that the cache has. The biases of `attention_bias` are those of the maps
    into latents; that of the queries is `query_bias`.
    """

    config: ModelConfig
    address: str

    @staticmethod
    def cache_arrays(config: ModelConfig) -> dict[str, tuple[int, int]]:
        """What the cache keeps of a token: {name: (heads, width)}."""
        kind = latent_of(config)
        widths = {"latent": kind.key_value_rank, "shared_key": kind.rotary_width}
        return {name: (1, width) for name, width in widths.items() if width}

    @staticmethod
    def stages(config: ModelConfig) -> list[tuple[str, ...]]:
        """The linear maps in the order in which they are used; those of a stage read the same input."""
        into = (
            [("query", "latent")] if latent_of(config).query_rank is None else [("query_latent", "latent"), ("query",)]
        )
        return [*into, ("expand",), ("output",)]

    @staticmethod
    def core_flops(config: ModelConfig, length: int) -> float:
        """Operations per token and layer beside the linear maps, at `length` tokens without a cache."""
        kind = latent_of(config)
        return 2.0 * length * config.heads * (kind.plain_width + kind.rotary_width + kind.value_width)

    def setup(self):
        config, address, kind = self.config, self.address, latent_of(self.config)
        norms = config.replace(norm_epsilon=kind.norm_epsilon)
        query_width, inner = config.width, kind.plain_width + kind.rotary_width
        if kind.query_rank is not None:
            query_width, biased = kind.query_rank, config.attention_bias
            self.query_latent = Linear(config, f"{address}/query_latent", config.width, query_width, biased)
            if kind.norms:
                self.query_norm = Norm(norms, f"{address}/query_norm", kind="rms")
        self.query = Linear(config, f"{address}/query", query_width, config.heads * inner, kind.query_bias)
        latent = kind.key_value_rank + kind.rotary_width
        self.latent = Linear(config, f"{address}/latent", config.width, latent, config.attention_bias)
        if kind.norms:
            self.latent_norm = Norm(norms, f"{address}/latent_norm", kind="rms")
        expanded = config.heads * (kind.plain_width + kind.value_width)
        self.expand = Linear(config, f"{address}/expand", kind.key_value_rank, expanded, False)
        self.output = Linear(
            config, f"{address}/output", config.heads * kind.value_width, config.width, config.output_bias
        )
        self.core = Core(config, inner**-0.5 if config.attention_scale is None else config.attention_scale)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context = Context(),  # noqa: B008  (a tuple, never changed)
        *,
        cache: LayerCache | None = None,
        deterministic: bool = True,
        need_probabilities: bool = False,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B H T S"] | None, LayerCache | None]:
        kind = latent_of(self.config)
        if kind.query_rank is None:
            query, latent = project_together(x, (self.query, self.latent))
        else:
            narrow, latent = project_together(x, (self.query_latent, self.latent))
            query = self.query(self.query_norm(narrow).astype(x.dtype) if kind.norms else narrow)
        query = query.reshape(*x.shape[:-1], self.config.heads, -1)
        latent, key = jnp.split(latent[:, :, None], [kind.key_value_rank], axis=-1)
        plain, turned = jnp.split(query, [kind.plain_width], axis=-1)
        latent = self.latent_norm(latent).astype(x.dtype) if kind.norms else latent
        kept = {"latent": latent, "shared_key": self._turn(key, context)}
        form = self.naive
        if cache is not None:
            seen, cache = cache.extend({n: kept[n] for n in self.cache_arrays(self.config)}, ring=is_ring(self.config))
            empty = jnp.zeros((*seen["latent"].shape[:-1], 0), x.dtype)
            kept = {"shared_key": empty, **seen}
            form = self.absorbed if self._is_cheaper(x.shape[1], kept["latent"].shape[1]) else self.naive
        need = {"deterministic": deterministic, "need_probabilities": need_probabilities}
        y, probabilities = form(plain, self._turn(turned, context), kept["latent"], kept["shared_key"], context, **need)
        return self.output(y.reshape(*y.shape[:-2], -1)), probabilities, cache

    def _turn(self, x: Float[Array, "B T H w"], context: Context) -> Float[Array, "B T H w"]:
        if context.rotation is None or not x.shape[-1]:
            return x
        if latent_of(self.config).interleaved:  # scores are products, so the order of pairs does not matter to them
            x = jnp.concatenate([x[..., 0::2], x[..., 1::2]], -1)
        return rotate(x, *context.rotation)

    def _is_cheaper(self, tokens: int, slots: int) -> bool:
        """Whether the absorbed form is less work than the naive one, for `tokens` that see `slots`."""
        kind = latent_of(self.config)
        rank, own = kind.key_value_rank, kind.plain_width + kind.value_width
        absorbed = tokens * rank * own + tokens * slots * (2 * rank + kind.rotary_width)
        return absorbed < slots * rank * own + tokens * slots * (own + kind.rotary_width)

    def naive(
        self,
        plain: Float[Array, "B T H p"],
        turned: Float[Array, "B T H w"],
        latent: Float[Array, "B S 1 R"],
        key: Float[Array, "B S 1 w"],
        context: Context,
        **need: bool,
    ) -> tuple[Float[Array, "B T H v"], Float[Array, "B H T S"] | None]:
        """Expands the latents into every head's keys and values."""
        both = self.expand(latent[:, :, 0]).reshape(*latent.shape[:2], self.config.heads, -1)
        own, value = jnp.split(both, [plain.shape[-1]], axis=-1)
        keys = jnp.concatenate([own, jnp.broadcast_to(key, (*own.shape[:-1], key.shape[-1]))], -1)
        query = jnp.concatenate([plain, turned], -1)
        keep_projections(self, query, keys, value)
        return self.core(query, keys, value, context.mask, context.bias, **need)

    def absorbed(
        self,
        plain: Float[Array, "B T H p"],
        turned: Float[Array, "B T H w"],
        latent: Float[Array, "B S 1 R"],
        key: Float[Array, "B S 1 w"],
        context: Context,
        **need: bool,
    ) -> tuple[Float[Array, "B T H v"], Float[Array, "B H T S"] | None]:
        """Attends to the latents themselves, which serve all heads as keys and values."""
        kernel = self.expand.matrix().astype(plain.dtype)
        kernel = kernel.reshape(kernel.shape[0], self.config.heads, -1)
        into, out = jnp.split(kernel, [plain.shape[-1]], axis=-1)
        query = jnp.einsum("bthp,rhp->bthr", plain, into, preferred_element_type=jnp.float32).astype(plain.dtype)
        query, keys = jnp.concatenate([query, turned], -1), jnp.concatenate([latent, key], -1)
        y, probabilities = self.core(query, keys, latent, context.mask, context.bias, **need)
        y = jnp.einsum("bthr,rhv->bthv", y, out, preferred_element_type=jnp.float32).astype(plain.dtype)
        return y, probabilities
