"""Rotary position embedding on plain arrays (Su et al. 2021), the two halves of a head as real and imaginary parts."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from flaxcompress.config import Rotary


def frequencies(rotary: Rotary, width: int, *, local: bool = False) -> Float[np.ndarray, " h"]:
    """The angle per position of each of the d/2 pairs, float32: θ^(-2i/d), stretched as `rotary` says.

    "llama3" leaves wavelengths under original/high alone, divides those over original/low by the factor, and blends
    between (Llama 3.1's release); "yarn" blends evenly from the pair that turns `high` times over the original length
    to the one that turns `low` times (Peng et al. 2023, §3.2). Local layers with a θ of their own are never stretched.
    Where `rotary` names its pairs, those frequencies of a head of its width, whatever d.
    """
    if rotary.pairs is not None and rotary.pairs_of is not None:
        whole = dataclasses.replace(rotary, pairs=None, pairs_of=None)
        return frequencies(whole, rotary.pairs_of, local=local)[list(rotary.pairs)]
    theta = rotary.local_theta if local and rotary.local_theta is not None else rotary.theta
    base = 1.0 / theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
    if rotary.scaling == "none" or (local and rotary.local_theta is not None):
        return base.astype(np.float32)
    if rotary.scaling == "linear":
        return (base / rotary.factor).astype(np.float32)
    low, high = rotary.low_frequency_factor, rotary.high_frequency_factor
    if rotary.scaling == "yarn":
        place = lambda turns: (  # noqa: E731  (of the pair that turns so often)
            width * math.log(rotary.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))
        )
        first, last = place(high), place(low)
        if rotary.whole:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        last = first + 0.001 if first == last else last
        smooth = 1.0 - np.clip((np.arange(width // 2) - first) / (last - first), 0.0, 1.0)
    else:
        turns = rotary.original_positions * base / (2 * math.pi)  # over the original length
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - smooth) * base / rotary.factor + smooth * base).astype(np.float32)


def rotation(
    positions: Integer[Array, "B T"], frequency: Float[np.ndarray, " h"], magnitude: float = 1.0
) -> tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]:
    """(cos, sin) of every position's angles, times the magnitude, float32."""
    angles = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angles)[:, :, None, :] * magnitude, jnp.sin(angles)[:, :, None, :] * magnitude


def rotate(
    x: Float[Array, "B T H d"], cos: Float[Array, "B T 1 h"], sin: Float[Array, "B T 1 h"]
) -> Float[Array, "B T H d"]:
    """Turns the pairs (x_i, x_{i+d/2}) by their angles, in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
