"""How the next token is chosen from logits: penalties and filters on plain arrays, and the draw."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

NEVER = -1e30  # finite: a row in which nothing is left stays free of NaN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """The rules of choice. At temperature 0 the likeliest token is taken.

    Attributes:
      temperature: what logits are divided by.
      top_k: only the k likeliest tokens; None: all.
      top_p: only the fewest tokens that together have at least this probability (Holtzman et al. 2020).
      repetition_penalty: logits of tokens seen so far are divided by it when positive and multiplied when negative
        (Keskar et al. 2019).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"generate: temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"generate: top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"generate: top_p must lie in (0, 1], got {self.top_p}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"generate: repetition_penalty must be positive, got {self.repetition_penalty}")
        if not self.temperature and (self.top_k is not None or self.top_p is not None):
            raise ValueError("generate: top_k and top_p need a temperature above 0: greedy choice ignores them")


def penalize(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float) -> Float[Array, "B V"]:
    """Makes the tokens in `seen` less likely, whatever the sign of their logits."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Leaves the k largest logits of each row, and those equal to the last of them."""
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < least, NEVER, logits)


def filter_top_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Leaves the fewest largest logits of each row whose probabilities sum to at least p."""
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
    count = jnp.sum(before < p, axis=-1, keepdims=True)  # the first one is always left
    least = jnp.take_along_axis(ordered, jnp.maximum(count, 1) - 1, axis=-1)
    return jnp.where(logits < least, NEVER, logits)


def choose(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None, rules: Sampling, key: PRNGKeyArray
) -> Integer[Array, " B"]:
    """The next token of each row."""
    if rules.repetition_penalty != 1.0:
        assert seen is not None
        logits = penalize(logits, seen, rules.repetition_penalty)
    if not rules.temperature:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / rules.temperature
    if rules.top_k is not None:
        logits = filter_top_k(logits, rules.top_k)
    if rules.top_p is not None:
        logits = filter_top_p(logits, rules.top_p)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
