"""BitFit: the biases alone learn (Ben Zaken et al. 2022)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from flaxcompress import tree
from flaxcompress.tuning.base import Tuning, register


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Biases(Tuning):
    """The biases of the maps and the norms in layers that `pattern` matches; nothing is put on the model."""

    name: ClassVar[str] = "biases"

    pattern: str = r"(decoder/)?layers/\d+/.*/bias"

    @property
    def trainable(self):
        return self.pattern

    def __call__(self, model, *, key):
        del key
        found = [address for address in tree.View(model.params) if address.endswith("/bias")]
        if not found:
            raise ValueError("biases: the model has none; use lora or adapters")
        tree.select(found, self.pattern, where="biases: pattern")
        return model
