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
        where convolutions need them the last inputs, "projection_inputs" [L, B, 1, k - 1, D] and the like. While
        decoding, a tuple of the layers' arrays in place of each stack (see `lay_out`).
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
    """One layer's part of a cache, and what its tokens add to it, which `stored` puts into all layers' arrays at once.

    The arrays are only read while the layers run: writing them layer by layer makes XLA copy all of them every time.

    Attributes:
      kept: {name: [B, K, S, d]} before these tokens.
      slots: where they go.
      new: {name: [B, K, t, d]}, what they leave.
      whole: {name: [B, K, S, d]}, arrays that are exchanged.
    """

    kept: Any
    slots: Integer[Array, " t"]
    new: Any
    whole: Any

    def read(self, name: str, dtype: Any) -> Float[Array, "B S K d"]:
        """What this layer keeps, what was stored or filled included."""
        array = self.whole.get(name, self.kept[name])
        if name in self.new:
            array = _put(array, self.new[name], self.slots)
        return array.transpose(0, 2, 1, 3).astype(dtype)

    def store(self, name: str, new: Float[Array, "B T K d"]) -> LayerCache:
        """With what the last tokens leave put into their slots."""
        last = new[:, -self.slots.shape[0] :].transpose(0, 2, 1, 3).astype(self.kept[name].dtype)
        return self._replace(new={**self.new, name: last})

    def extend(
        self, new: dict[str, Float[Array, "B T K d"]], *, ring: bool
    ) -> tuple[dict[str, Float[Array, "B S K d"]], LayerCache]:
        """What the tokens see of every array, theirs included, and the cache with them stored."""
        after = self
        for name, array in new.items():
            after = after.store(name, array)
        if ring and next(iter(new.values())).shape[1] > 1:  # they may push out what their first ones still see
            return {n: jnp.concatenate([self.read(n, array.dtype), array], 1) for n, array in new.items()}, after
        return {n: after.read(n, array.dtype) for n, array in new.items()}, after

    def fill(self, name: str, array: Float[Array, "B S K d"]) -> LayerCache:
        """With all of an array exchanged."""
        whole = array.transpose(0, 2, 1, 3).astype(self.kept[name].dtype)
        return self._replace(whole={**self.whole, name: whole})


def stored(
    layers: dict[str, Any], new: dict[str, Any], whole: dict[str, Any], slots: Integer[Array, " t"]
) -> dict[str, Any]:
    """All layers' arrays [L, B, K, S, d] with new tokens [L, B, K, t, d] put into their slots, and some exchanged."""
    if laid_out(layers):
        put = {n: tuple(_put(a, new[n][i], slots) for i, a in enumerate(layers[n])) for n in new}
        return {**layers, **put, **{n: tuple(array) for n, array in whole.items()}}
    return {n: _put(array, new[n], slots) if n in new else whole.get(n, array) for n, array in layers.items()}


def cut(cache: Cache, length: int) -> Cache:
    """The cache as it was after its first `length` tokens, none of which may be padding or have been overwritten.

    Not for models with convolutions, whose last inputs are not kept for every token.
    """
    slots = cache.real.shape[1]
    return cache._replace(
        real=cache.real & (jnp.arange(slots) < length),
        length=jnp.asarray(length, jnp.int32),
        counts=jnp.full_like(cache.counts, length),
    )


def grow(cache: Cache, slots: int) -> Cache:
    """With room for more tokens; not for a ring that has gone round, and not for a cache laid out."""
    before = cache.real.shape[1]

    def pad(x: Any, axis: int) -> Any:
        return jnp.pad(x, [(0, slots - before if i == axis % x.ndim else 0) for i in range(x.ndim)])

    growing = lambda name, x: x.shape[-2] == before and not name.startswith("cross_")  # noqa: E731
    return cache._replace(
        layers={name: pad(x, -2) if growing(name, x) else x for name, x in cache.layers.items()},
        real=pad(cache.real, 1),
        places=pad(cache.places, 0),
    )


def laid_out(layers: Any) -> bool:
    """Whether a cache's arrays are tuples, one array per layer."""
    return layers is not None and any(isinstance(array, tuple) for array in layers.values())


def lay_out(cache: Cache) -> Cache:
    """With each layer's arrays apart, for a loop over tokens: they are then written in place, and read without a copy.

    Layers run one after another with such a cache, not in a loop, which would copy their part of every stack per token.
    """
    return cache._replace(layers={name: tuple(array) for name, array in cache.layers.items()})


def stack_up(cache: Cache) -> Cache:
    """The inverse of `lay_out`."""
    return cache._replace(layers={name: jnp.stack(arrays) for name, arrays in cache.layers.items()})


def _put(array: Float[Array, "*B S d"], new: Float[Array, "*B t d"], slots: Integer[Array, " t"]) -> Any:
    """Exchanges the slots of new tokens; several may go over the end of a ring."""
    if slots.shape[0] == 1:
        return jax.lax.dynamic_update_slice(array, new, (*(0,) * (array.ndim - 2), slots[0], 0))
    return array.at[..., slots, :].set(new)


def advance(cache: Cache, real: Bool[Array, "B T"], slots: Integer[Array, " t"]) -> Cache:
    """The cache's bookkeeping after some tokens; what layers keep is theirs to store."""
    tokens, last = real.shape[1], slots.shape[0]
    return cache._replace(
        real=cache.real.at[:, slots].set(real[:, -last:]),
        places=cache.places.at[slots].set((cache.length + tokens - last + jnp.arange(last)).astype(jnp.int32)),
        length=cache.length + tokens,
        counts=cache.counts + real.sum(1, dtype=jnp.int32),
    )
