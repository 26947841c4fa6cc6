"""Hidden states: their error relative to the teacher's norm."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flaxcompress.config import ModelConfig
from flaxcompress.train.objectives.base import Term
from flaxcompress.train.objectives.terms.base import DistillTerm, Pair
from flaxcompress.train.objectives.terms.layers import layers_match, of_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiddenSettings:
    """Settings of the term.

    Attributes:
      hidden: weight of the hidden states' error relative to the teacher's norm; both need the same width.
    """

    hidden: float = 1.0


def hidden_term(student: Float[Array, "L B T D"], teacher: Float[Array, "L B T D"], mask: Bool[Array, "B T"]) -> Term:
    """Squared error of the hidden states over the teacher's squared norm in this batch, per layer, mean over layers."""
    weights = mask.astype(jnp.float32)[None, :, :, None]
    error = (jnp.square(student - teacher) * weights).sum((1, 2, 3))
    size = (jnp.square(teacher) * weights).sum((1, 2, 3))
    tokens = mask.astype(jnp.float32).sum()
    return Term((error / jnp.maximum(size, 1e-12)).mean() * tokens, tokens)


def _fits(settings: Any, student: ModelConfig, teacher: ModelConfig) -> bool:
    if teacher.width != student.width or not layers_match(settings, student, teacher):
        raise ValueError(
            f"distill: {len(settings.layers or range(teacher.layers))} of the teacher's layers, of width "
            f"{teacher.width}, are compared with the student's {student.layers} of {student.width}: they cannot be; "
            "give layers, or use hidden=0"
        )
    return True


def _of(pair: Pair) -> Term:
    ours, theirs = (out.hidden_states[1:].astype(jnp.float32) for out in (pair.ours, pair.theirs))
    return hidden_term(ours, of_layers(pair.settings, theirs), pair.mask)


HIDDEN = DistillTerm(name="hidden", of=_of, needs=("hidden_states",), fits=_fits)
