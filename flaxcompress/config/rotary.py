"""Rotary positions."""

from __future__ import annotations

import dataclasses

from flaxcompress.config.names import closest
from flaxcompress.config.part import Part

ROTARY_SCALINGS = ("none", "linear", "llama3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary(Part):
    """Rotary positions (Su et al. 2021): the base θ of the frequencies, and how they are stretched for longer text.

    Attributes:
      theta: θ.
      local_theta: of layers with a window; None for `theta`.
      scaling: "none", "linear" (all frequencies divided by `factor`) or "llama3" (only the low ones, with a smooth
        change between).
      factor, low_frequency_factor, high_frequency_factor, original_positions: of the scaling.
    """

    theta: float = 10_000.0
    local_theta: float | None = None
    scaling: str = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192

    def __post_init__(self):
        if self.scaling not in ROTARY_SCALINGS:
            raise ValueError(f"rotary: unknown scaling {self.scaling!r}; {closest(self.scaling, ROTARY_SCALINGS)}")
        for name in ("theta", "factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"rotary: {name} must be positive, got {getattr(self, name)}")
