"""The key/value cache of decoding: static shapes, so that no step compiles anew."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from flaxcompress.config import ModelConfig


class Cache(NamedTuple):
    """What layers keep of the tokens so far; S slots, filled in turn and then from the start again (a ring).

    Attributes:
      layers: {"key": [L, B, K, S, d], "value": …}: what attention keeps of tokens, stacked over layers; heads before
        slots, as the products of attention want them. In a decoder also "cross_key" and "cross_value", of the memory;
        where convolutions need them the last inputs, "projection_inputs" [L, B, 1, k - 1, D] and the like.
      real: [B, S] whether a slot holds a token that may be seen (padding may not).
      places: [S] the place in the sequence of what a slot holds; the same for all rows.
      length: how many places are filled so far, padding included.
      counts: [B] how many tokens that are not padding each row has.
      memory_mask: which of the encoder's tokens are no padding, [B, M], in a decoder.
    """

    layers: Any
    real: Bool[Array, "B S"]
    places: Integer[Array, " S"]
    length: Integer[Array, ""]
    counts: Integer[Array, " B"]
    memory_mask: Any = None


def cache_slots(config: ModelConfig, length: int) -> int:
    """How many tokens the cache of a sequence of `length` has to keep."""
    return min(length, config.window + 1) if is_ring(config) else length


def is_ring(config: ModelConfig) -> bool:
    """Whether every layer has a window, so that slots can be used again."""
    return config.window > 0 and all(config.local)


def seen(cache: Cache, config: ModelConfig, real: Bool[Array, "B T"], slots: Integer[Array, " t"]):
    """What tokens attend to, (real [B, S], places [S]), and the cache after them (see `Attention`)."""
    after = advance(cache, real, slots)
    if is_ring(config) and real.shape[1] > 1:
        places = cache.length + jnp.arange(real.shape[1])
        return jnp.concatenate([cache.real, real], 1), jnp.concatenate([cache.places, places]), after
    return after.real, after.places, after


def slots_of(cache: Cache, tokens: int) -> Integer[Array, " t"]:
    """The slots of the next tokens; of more tokens than slots, only the last ones have one."""
    slots = cache.real.shape[1]
    last = min(tokens, slots)
    return (cache.length + tokens - last + jnp.arange(last)) % slots


class LayerCache(NamedTuple):
    """One layer's part of a cache. The stacked arrays are carried through the scan over layers and written in place.

    Attributes:
      layers: `Cache.layers`.
      index: which layer.
    """

    layers: Any
    index: Any

    def read(self, name: str, dtype: Any) -> Float[Array, "B S K d"]:
        """What this layer keeps."""
        kept = jax.lax.dynamic_index_in_dim(self.layers[name], self.index, 0, keepdims=False)
        return kept.transpose(0, 2, 1, 3).astype(dtype)

    def store(self, name: str, new: Float[Array, "B T K d"], slots: Integer[Array, " t"], *, wraps: bool) -> LayerCache:
        """With what the last tokens leave put into their slots, which are neighbours unless the ring `wraps`."""
        old = self.layers[name]
        last = new[:, -slots.shape[0] :].transpose(0, 2, 1, 3).astype(old.dtype)
        if wraps and slots.shape[0] > 1:
            changed = old.at[self.index, :, :, slots].set(last.transpose(2, 0, 1, 3))
        else:
            changed = jax.lax.dynamic_update_slice(old, last[None], (self.index, 0, 0, slots[0], 0))
        return self._replace(layers={**self.layers, name: changed})

    def extend(
        self, new: dict[str, Float[Array, "B T K d"]], slots: Integer[Array, " t"], *, ring: bool
    ) -> tuple[dict[str, Float[Array, "B S K d"]], LayerCache]:
        """What the tokens see of every array, theirs included, and the cache with them stored."""
        after = self
        for name, array in new.items():
            after = after.store(name, array, slots, wraps=ring)
        if ring and next(iter(new.values())).shape[1] > 1:  # they may push out what their first ones still see
            return {n: jnp.concatenate([self.read(n, array.dtype), array], 1) for n, array in new.items()}, after
        return {n: after.read(n, array.dtype) for n, array in new.items()}, after

    def fill(self, name: str, new: Float[Array, "B M K d"]) -> LayerCache:
        """With all of an array exchanged in this layer."""
        old = self.layers[name]
        rows = new.transpose(0, 2, 1, 3).astype(old.dtype)[None]
        return self._replace(
            layers={**self.layers, name: jax.lax.dynamic_update_slice(old, rows, (self.index, 0, 0, 0, 0))}
        )


def advance(cache: Cache, real: Bool[Array, "B T"], slots: Integer[Array, " t"]) -> Cache:
    """The cache's bookkeeping after some tokens; what layers keep is theirs to store."""
    tokens, last = real.shape[1], slots.shape[0]
    return cache._replace(
        real=cache.real.at[:, slots].set(real[:, -last:]),
        places=cache.places.at[slots].set((cache.length + tokens - last + jnp.arange(last)).astype(jnp.int32)),
        length=cache.length + tokens,
        counts=cache.counts + real.sum(1, dtype=jnp.int32),
    )
