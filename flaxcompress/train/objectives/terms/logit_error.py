"""The heads' logits: their squared difference."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flaxcompress.train.objectives.base import Term
from flaxcompress.train.objectives.terms.base import DistillTerm, Pair
from flaxcompress.train.objectives.terms.logits import both_logits, have_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitErrorSettings:
    """Settings of the term.

    Attributes:
      logit_error: weight of the logits' mean squared difference, where both models have a head.
    """

    logit_error: float = 0.0


def logit_error_term(student: Float[Array, "*B V"], teacher: Float[Array, "*B V"], mask: Bool[Array, "*B"]) -> Term:
    """Mean squared difference of the logits (Ba & Caruana 2014), over the real tokens."""
    weights = mask.astype(jnp.float32)
    return Term((jnp.square(student - teacher).mean(-1) * weights).sum(), weights.sum())


def _of(pair: Pair) -> Term:
    return logit_error_term(*both_logits(pair))


LOGIT_ERROR = DistillTerm(name="logit_error", of=_of, needs=("logits",), fits=have_heads)
