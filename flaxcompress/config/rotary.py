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
      pairs: the frequencies by which pairs turn, as their places among those of a head that is `pairs_of` wide; None:
        all of the head's, in order. Some may be left out, and some may serve several pairs.
      pairs_of: that width.
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
    pairs: tuple[int, ...] | None = None
    pairs_of: int | None = None

    def __post_init__(self):
        if self.scaling not in ROTARY_SCALINGS:
            raise ValueError(f"rotary: unknown scaling {self.scaling!r}; {closest(self.scaling, ROTARY_SCALINGS)}")
        for name in ("theta", "factor", "magnitude"):
            if not getattr(self, name) > 0:
                raise ValueError(f"rotary: {name} must be positive, got {getattr(self, name)}")
        if (self.pairs is None) != (self.pairs_of is None):
            raise ValueError(f"rotary: give both pairs and pairs_of or none, got {self.pairs} and {self.pairs_of}")
        if self.pairs is not None and self.pairs_of is not None:
            object.__setattr__(self, "pairs", tuple(self.pairs))  # a list in JSON
            if not all(0 <= pair < self.pairs_of // 2 for pair in self.pairs):
                raise ValueError(
                    f"rotary: pairs must lie in 0 … {self.pairs_of // 2 - 1} of a head {self.pairs_of} wide, got "
                    f"{self.pairs}"
                )
