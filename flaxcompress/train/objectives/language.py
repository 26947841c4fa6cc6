"""The next token: causal language modelling, and a decoder's on an encoder's text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flaxcompress.train.objectives.base import Objective, Run, Terms, cross_entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken(Objective):
    """Cross-entropy of `labels` [B, T], already shifted: for causal LM, span corruption and translation alike.

    Attributes:
      label_smoothing, z_loss: see `cross_entropy`.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def loss(self, run: Run, constants: Any, batch: Mapping[str, Any]) -> Terms:
        del constants
        return cross_entropy(run(batch).logits, batch["labels"], smoothing=self.label_smoothing, z_loss=self.z_loss)
