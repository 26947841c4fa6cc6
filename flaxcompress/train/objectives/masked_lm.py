"""Masked language modelling, with the order of two sentences where the model has a head for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flaxcompress.train.objectives.base import Objective, Run, Terms, cross_entropy, renamed


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLM(Objective):
    """The masked tokens' cross-entropy (Devlin et al. 2019), plus that of two sentences' order (Lan et al. 2020, §3.1).

    Batches have `labels` for `label_positions` [B, M] or, without those, for all tokens [B, T]; for a "pretraining"
    head also `order_labels` [B].

    Attributes:
      order: the weight of the sentences' order.
      z_loss: see `cross_entropy`.
    """

    order: float = 1.0
    z_loss: float = 0.0

    def loss(self, run: Run, constants: Any, batch: Mapping[str, Any]) -> Terms:
        del constants
        logits = run(batch).logits
        terms = cross_entropy(getattr(logits, "masked_lm", logits), batch["labels"], z_loss=self.z_loss)
        if self.order and "order_labels" in batch:
            if not hasattr(logits, "sentence_order"):
                raise ValueError(
                    f"masked_lm: the batches have order_labels, but head {run.config.head!r} does not predict the "
                    'order of sentences; use head "pretraining"'
                )
            terms |= renamed(cross_entropy(logits.sentence_order, batch["order_labels"]), "order", self.order)
        return terms
