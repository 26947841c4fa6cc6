"""What a classifier's head makes of the last layer's output."""

from __future__ import annotations

import dataclasses

from flaxcompress.config.names import closest
from flaxcompress.config.part import Part

CLASSIFIER_POOLINGS = ("pooler", "first", "mean", "last", "last_unpadded")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier(Part):
    """A classifier's head: pooling (of sequences), transform, norm, and the map to the classes.

    Attributes:
      pooling: what stands for a sequence: "pooler" (the pooler's output, or the first token where there is no pooler),
        "first", "mean" of the tokens that are no padding, "last" of those, or "last_unpadded", the last whose id is not
        `pad_token`, which no mask decides.
      transform: a map of width D and the head's activation come first (`head_activation`, `head_bias`).
      norm: what the transform gives is normalised.
      bias: whether the map to the classes has one.
    """

    pooling: str = "pooler"
    transform: bool = False
    norm: bool = False
    bias: bool = True

    def __post_init__(self):
        if self.pooling not in CLASSIFIER_POOLINGS:
            raise ValueError(
                f"classifier: unknown pooling {self.pooling!r}; {closest(self.pooling, CLASSIFIER_POOLINGS)}"
            )
        for name in ("transform", "norm", "bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"classifier: {name} must be true or false, got {getattr(self, name)!r}")
        if self.norm and not self.transform:
            raise ValueError("classifier: norm=True makes sense with transform=True only")
