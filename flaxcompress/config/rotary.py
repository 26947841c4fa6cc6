"""Rotary positions."""

from __future__ import annotations

import dataclasses

from flaxcompress.config.names import closest
from flaxcompress.config.part import Part

ROTARY_SCALINGS = ("none", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary(Part):
    """Rotary positions (Su et al. 2021): the base θ of the frequencies, and how they are stretched for longer text.

    Attributes:
      theta: θ.
      local_theta: of layers with a window; None for `theta`.
      scaling: "none", "linear" (all frequencies divided by `factor`), "llama3" (only the low ones, with a smooth change
        between) or "yarn" (the change is by the place of the frequency instead; Peng et al. 2023, §3.2).
      factor: of the scaling.
      low_frequency_factor, high_frequency_factor: how often a frequency turns over `original_positions` to be a low or
        a high one.
      whole: the change begins and ends at whole places ("yarn").
      magnitude: what turned queries and keys are multiplied by ("yarn"; §3.4).
      pairs: which pairs of a head of `paired_width` are there, rising, where some have been dropped; (): all.
      paired_width: the width by which frequencies go, when pairs have been dropped; 0: the head's.
    """

    theta: float = 10_000.0
    local_theta: float | None = None
    scaling: str = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192
    whole: bool = True
    magnitude: float = 1.0
    pairs: tuple[int, ...] = ()
    paired_width: int = 0

    def __post_init__(self):
        object.__setattr__(self, "pairs", tuple(self.pairs))
        if sorted(set(self.pairs)) != list(self.pairs) or not all(0 <= j < self.paired_width // 2 for j in self.pairs):
            given = f"{list(self.pairs)} of a paired_width of {self.paired_width}"
            raise ValueError(f"rotary: pairs must rise and lie in 0 … paired_width/2 - 1, got {given}")
        if self.paired_width and not self.pairs:
            raise ValueError(f"rotary: paired_width {self.paired_width} without pairs; give both or none")
        if self.scaling not in ROTARY_SCALINGS:
            raise ValueError(f"rotary: unknown scaling {self.scaling!r}; {closest(self.scaling, ROTARY_SCALINGS)}")
        for name in ("theta", "factor", "magnitude"):
            if not getattr(self, name) > 0:
                raise ValueError(f"rotary: {name} must be positive, got {getattr(self, name)}")
