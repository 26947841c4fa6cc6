"""Classes of sequences, tokens or images, and numbers."""

from __future__ import annotations

import dataclasses
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
    """

    label_smoothing: float = 0.0

    def loss(self, run: Run, constants: Any, batch: Mapping[str, Any]) -> Terms:
        del constants
        logits, labels = run(batch).logits, batch["labels"]
        if run.config.head == "span":
            logits = jnp.swapaxes(logits, -1, -2)
        if not jnp.issubdtype(labels.dtype, jnp.floating):
            return cross_entropy(logits, labels, smoothing=self.label_smoothing)
        if logits.shape[-1] != 1:
            raise ValueError(f"classification: float labels need a head of one class, not {logits.shape[-1]}")
        counts = jnp.isfinite(labels)
        error = jnp.square(logits[..., 0] - jnp.where(counts, labels, 0.0))
        weight = counts.astype(jnp.float32).sum()
        return {"squared_error": Term(jnp.where(counts, error, 0.0).sum(), weight)}
