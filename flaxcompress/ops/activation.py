"""Feed-forward non-linearities by name."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def _gelu(x: Array) -> Array:
    """x·Φ(x) by erf, as PyTorch has it: on CPU twice as fast as by erfc, which jax.nn.gelu uses."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * np.asarray(2**-0.5, x.dtype)))


_FUNCTIONS = {
    "gelu": _gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


def activate(x: Float[Array, "*B F"], name: str) -> Float[Array, "*B F"]:
    """Applies `name`: "gelu" (exact, by erf), "gelu_tanh", "relu", "silu" or "tanh"."""
    return _FUNCTIONS[name](x)
