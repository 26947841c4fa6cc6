"""Hard labels: what the batch itself says, beside what a teacher does."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from flaxcompress.config import ModelConfig
from flaxcompress.train.objectives.base import Term, cross_entropy
from flaxcompress.train.objectives.terms.base import DistillTerm, Pair


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardSettings:
    """Settings of the term.

    Attributes:
      hard: weight of the cross-entropy of the batch's own `labels`: classes [B] or [B, T], the next tokens [B, T] as
        causal batches have them, or masked ones; those that are `IGNORED` do not count.
    """

    hard: float = 0.0


def _fits(settings: Any, student: ModelConfig, teacher: ModelConfig) -> bool:
    del settings, teacher
    if student.head == "none":
        raise ValueError("distill: hard labels need a student with a head, and it has none; use hard=0")
    return True


def _of(pair: Pair) -> Term:
    logits = getattr(pair.ours.logits, "masked_lm", pair.ours.logits)
    if "labels" not in pair.batch:
        raise ValueError("distill: the batches have no labels; use hard=0, or batches of a task that has them")
    labels = pair.batch["labels"]
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"distill: hard labels are {labels.dtype} of shape {labels.shape}, but the student's logits of shape "
            f"{logits.shape} need integers of shape {logits.shape[:-1]}; use hard=0"
        )
    return cross_entropy(logits, labels)["cross_entropy"]


HARD = DistillTerm(name="hard", of=_of, needs=("logits",), fits=_fits)
