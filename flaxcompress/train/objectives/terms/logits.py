"""The heads' logits: the divergence of what they predict."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flaxcompress.config import ModelConfig
from flaxcompress.train.objectives.base import IGNORED, Term
from flaxcompress.train.objectives.terms.base import DistillTerm, Pair


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitsSettings:
    """Settings of the term.

    Attributes:
      logits: weight of KL(teacher‖student) of the heads' logits, where both models have a head.
      temperature: that the logits are divided by in the divergence.
    """

    logits: float = 1.0
    temperature: float = 1.0


def logits_term(
    student: Float[Array, "*B V"], teacher: Float[Array, "*B V"], mask: Bool[Array, "*B"], temperature: float = 1.0
) -> Term:
    """KL(teacher‖student)·τ² over the real tokens (Hinton et al. 2015)."""
    log_t = jax.nn.log_softmax(teacher / temperature, axis=-1)
    log_s = jax.nn.log_softmax(student / temperature, axis=-1)
    divergence = (jnp.exp(log_t) * (log_t - log_s)).sum(-1)
    weights = mask.astype(jnp.float32)
    return Term((divergence * weights).sum() * temperature**2, weights.sum())


def have_heads(settings: Any, student: ModelConfig, teacher: ModelConfig) -> bool:
    """Whether both models have logits to compare."""
    del settings
    return "none" not in (student.head, teacher.head)


def both_logits(pair: Pair) -> tuple[Float[Array, "*B V"], Float[Array, "*B V"], Bool[Array, "*B"]]:
    """The logits of student and teacher in float32, and which of them count."""
    ours, theirs = (getattr(out.logits, "masked_lm", out.logits) for out in (pair.ours, pair.theirs))
    if ours.shape != theirs.shape:
        raise ValueError(f"distill: the student's logits are {ours.shape}, the teacher's {theirs.shape}")
    if "label_positions" in pair.batch:
        counts = pair.batch["labels"] != IGNORED
    else:
        counts = pair.mask if ours.ndim == pair.mask.ndim + 1 else pair.mask.any(1)
    return ours.astype(jnp.float32), theirs.astype(jnp.float32), counts


def _check(settings: Any, where: str) -> None:
    if not settings.temperature > 0:
        raise ValueError(f"{where}: temperature must be positive, got {settings.temperature}")


def _of(pair: Pair) -> Term:
    return logits_term(*both_logits(pair), pair.settings.temperature)


LOGITS = DistillTerm(name="logits", of=_of, needs=("logits",), check=_check, fits=have_heads)
