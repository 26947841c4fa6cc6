"""Feed-forward non-linearities by name."""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float

_FUNCTIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def activate(x: Float[Array, "*B F"], name: str) -> Float[Array, "*B F"]:
    """Applies `name`: "gelu" (exact, by erf), "gelu_tanh", "relu" or "silu"."""
    return _FUNCTIONS[name](x)
