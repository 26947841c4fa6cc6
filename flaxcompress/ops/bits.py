"""Small unsigned integers packed into bytes along the last axis, the first of them in the lowest bits.

4 bits: two values per byte, low nibble first. 2 bits: four per byte. 1 bit: eight. 3 bits: eight values in three bytes
(a 24-bit little-endian word). Rows are padded with zeros to whole groups.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, UInt8

_PER_WORD = {1: 8, 2: 4, 3: 8, 4: 2}  # values in one word of whole bytes


def packed_width(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take in one row."""
    if bits == 8:
        return count
    per_word = _PER_WORD[bits]
    return -(-count // per_word) * per_word * bits // 8


def pack(codes: Integer[Array, "*B n"] | np.ndarray, bits: int) -> UInt8[Array, "*B p"]:
    """Packs codes in [0, 2^bits) into bytes; p = `packed_width(n, bits)`.

    Outside of traced code this runs on the host: packing a hundred matrices of different shapes compiles nothing.
    """
    codes = on_host(codes)
    return jnp.asarray(_pack(codes, bits, np if isinstance(codes, np.ndarray) else jnp))


def on_host(x: Any) -> Any:
    """`x` as a NumPy array, or unchanged while it is being traced."""
    traced = isinstance(x, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]
    return x if traced else np.asarray(x)


def _pack(codes: Any, bits: int, xp: Any) -> Any:
    if bits == 8:
        return codes.astype(xp.uint8)
    per_word = _PER_WORD[bits]
    short = -codes.shape[-1] % per_word
    codes = xp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
    codes = codes.reshape(*codes.shape[:-1], -1, per_word).astype(xp.uint32)
    words = (codes << (bits * xp.arange(per_word, dtype=xp.uint32))).sum(-1, dtype=xp.uint32)
    n_bytes = per_word * bits // 8
    parts = (words[..., None] >> (8 * xp.arange(n_bytes, dtype=xp.uint32))) & 0xFF
    return parts.reshape(*words.shape[:-1], -1).astype(xp.uint8)


def unpack(packed: UInt8[Array, "*B p"], bits: int, count: int) -> UInt8[Array, "*B {count}"]:
    """The inverse of `pack`: the first `count` codes of every row."""
    if bits == 8:
        return packed[..., :count]
    per_word = _PER_WORD[bits]
    n_bytes = per_word * bits // 8
    if n_bytes == 1:
        words = packed[..., None]
        shifts = jnp.asarray(bits * np.arange(per_word), jnp.uint8)
        codes = (words >> shifts) & jnp.uint8(2**bits - 1)
    else:
        parts = packed.reshape(*packed.shape[:-1], -1, n_bytes).astype(jnp.uint32)
        words = (parts << jnp.asarray(8 * np.arange(n_bytes), jnp.uint32)).sum(-1, dtype=jnp.uint32)
        codes = (words[..., None] >> jnp.asarray(bits * np.arange(per_word), jnp.uint32)) & jnp.uint32(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1)[..., :count].astype(jnp.uint8)
