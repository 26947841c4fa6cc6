"""Low-rank deltas: what a layer adds to the weights that it shares with others."""

from __future__ import annotations

import dataclasses
import re

from flaxcompress.config.part import Part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deltas(Part):
    """x @ W becomes x @ W + α/R · x @ down @ up in the linear maps of a layer (Hu et al. 2022; Bae et al. 2024, §2.3).

    Their sharing map is their own, so that every layer may differ from the others that use W.

    Attributes:
      rank: R.
      alpha: α; None: R, a scale of 1.
      targets: full-match patterns of linear maps in a layer: "attention/query", "feed_forward/.*"; by default all.
      bias: those of them that have a bias get another one, which is added to it.
    """

    rank: int
    alpha: float | None = None
    targets: tuple[str, ...] = (".*",)
    bias: bool = False

    def __post_init__(self):
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"deltas: rank must be a positive integer, got {self.rank!r}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"deltas: alpha must be positive, got {self.alpha!r}")
        if not isinstance(self.bias, bool):
            raise ValueError(f"deltas: bias must be true or false, got {self.bias!r}")
        if isinstance(self.targets, str) or not self.targets:
            raise ValueError(f"deltas: targets must be a list of patterns, got {self.targets!r}")
        object.__setattr__(self, "targets", tuple(self.targets))
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(f"deltas: {target!r} is not a regular expression: {error}") from None

    @property
    def scale(self) -> float:
        """What the product of both factors is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank
