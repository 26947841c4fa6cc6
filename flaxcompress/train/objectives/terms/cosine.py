"""Sentence vectors: 1 - their cosine."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flaxcompress.config import ModelConfig
from flaxcompress.encoding import pool
from flaxcompress.train.objectives.base import Term
from flaxcompress.train.objectives.terms.base import DistillTerm, Pair, check_width


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineSettings:
    """Settings of the term.

    Attributes:
      cosine: weight of 1 - cosine of sentence vectors, pooled as the teacher's are.
    """

    cosine: float = 1.0


def cosine_term(student: Float[Array, "B D"], teacher: Float[Array, "B D"], real: Bool[Array, " B"]) -> Term:
    """1 - the mean cosine between sentence vectors, over the rows that are `real`."""
    s = student * jax.lax.rsqrt(jnp.maximum(jnp.square(student).sum(-1, keepdims=True), 1e-24))
    t = teacher * jax.lax.rsqrt(jnp.maximum(jnp.square(teacher).sum(-1, keepdims=True), 1e-24))
    weights = real.astype(jnp.float32)
    return Term(((1.0 - (s * t).sum(-1)) * weights).sum(), weights.sum())


def _fits(settings: Any, student: ModelConfig, teacher: ModelConfig) -> bool:
    del settings
    check_width("vectors", "cosine", student, teacher)
    return True


def _of(pair: Pair) -> Term:
    ours, theirs = (pool(out.last_hidden_state, pair.mask, pair.pooling) for out in (pair.ours, pair.theirs))
    return cosine_term(ours, theirs, pair.mask.any(1))


COSINE = DistillTerm(name="cosine", of=_of, fits=_fits)
