"""Classes of sequences, tokens or images, and numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from flaxcompress.train.objectives.base import Objective, Run, Term, Terms, cross_entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Objective):
    """Cross-entropy of integer `labels` ([B], or [B, T] for tokens); squared error of float ones [B] for one class.

    A float label that is not a number does not count. The labels of a span are its first and last token, [B, 2].

    Attributes:
      label_smoothing: see `cross_entropy`.
      class_weights: what a label of each class counts; (): all alike.
    """

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()

    def __post_init__(self):
        if any(not 0 <= weight < math.inf for weight in self.class_weights) or (
            self.class_weights and not any(self.class_weights)
        ):
            raise ValueError(f"classification: class_weights must not be negative, got {list(self.class_weights)}")

    def loss(self, run: Run, constants: Any, batch: Mapping[str, Any]) -> Terms:
        del constants
        logits, labels = run(batch).logits, batch["labels"]
        if run.config.head == "span":
            logits = jnp.swapaxes(logits, -1, -2)
        if not jnp.issubdtype(labels.dtype, jnp.floating):
            if self.class_weights and len(self.class_weights) != logits.shape[-1]:
                given, classes = len(self.class_weights), logits.shape[-1]
                raise ValueError(f"classification: {given} class_weights, but the model has {classes} classes")
            return cross_entropy(logits, labels, smoothing=self.label_smoothing, weights=self.class_weights)
        if logits.shape[-1] != 1:
            raise ValueError(f"classification: float labels need a head of one class, not {logits.shape[-1]}")
        counts = jnp.isfinite(labels)
        error = jnp.square(logits[..., 0] - jnp.where(counts, labels, 0.0))
        weight = counts.astype(jnp.float32).sum()
        return {"squared_error": Term(jnp.where(counts, error, 0.0).sum(), weight)}
