"""Small unsigned integers packed into bytes along the last axis, the first of them in the lowest bits.

Codes of `b` bits follow one another without gaps, in words of whole bytes: two codes of 4 bits in one byte, four of
6 bits in three, eight of 1, 3, 5 or 7 bits in as many bytes as they have bits. Rows are padded with zeros to whole
words.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, UInt8


def _word(bits: int) -> tuple[int, int]:
    """Codes in one word, and its bytes."""
    codes = 8 // math.gcd(bits, 8)
    return codes, codes * bits // 8


def packed_width(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take in one row."""
    codes, n_bytes = _word(bits)
    return -(-count // codes) * n_bytes


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
    per_word, n_bytes = _word(bits)
    short = -codes.shape[-1] % per_word
    codes = xp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
    codes = codes.reshape(*codes.shape[:-1], -1, per_word).astype(xp.uint32)
    found = []
    for byte in range(n_bytes):
        shifts = [(i, bits * i - 8 * byte) for i in range(per_word) if -bits < bits * i - 8 * byte < 8]
        parts = [codes[..., i] << shift if shift >= 0 else codes[..., i] >> -shift for i, shift in shifts]
        found.append(sum(parts[1:], parts[0]) & 0xFF)  # the parts' bits do not overlap
    return xp.stack(found, -1).reshape(*codes.shape[:-2], -1).astype(xp.uint8)


def unpack(packed: UInt8[Array, "*B p"], bits: int, count: int) -> UInt8[Array, "*B {count}"]:
    """The inverse of `pack`: the first `count` codes of every row."""
    if bits == 8:
        return packed[..., :count]
    per_word, n_bytes = _word(bits)
    starts = bits * np.arange(per_word)
    words = packed.reshape(*packed.shape[:-1], -1, n_bytes)
    if n_bytes == 1:
        codes = words >> jnp.asarray(starts, jnp.uint8)
    else:  # a code lies in one byte, or in that and the next
        low = words[..., starts // 8].astype(jnp.uint16)
        high = words[..., np.minimum(starts // 8 + 1, n_bytes - 1)].astype(jnp.uint16)
        codes = (low | high << 8) >> jnp.asarray(starts % 8, jnp.uint16)
    codes = codes.astype(jnp.uint8) & jnp.uint8(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1)[..., :count]
