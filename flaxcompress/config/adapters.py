"""Adapters: a narrow network behind what sublayers add."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from flaxcompress.config.names import ACTIVATIONS, closest
from flaxcompress.config.part import Part
from flaxcompress.config.sharing import SUBLAYERS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters(Part):
    """y becomes y + up(activation(down(y))) behind sublayers (Houlsby et al. 2019, §2.1).

    Attributes:
      width: between down and up.
      activation: one of the config's activations.
      after: the sublayers whose output is changed.
    """

    width: int
    activation: str = "gelu"
    after: tuple[str, ...] = ("attention", "feed_forward")

    def __post_init__(self):
        if not isinstance(self.width, int) or isinstance(self.width, bool) or self.width < 1:
            raise ValueError(f"adapters: width must be a positive integer, got {self.width!r}")
        if self.activation not in ACTIVATIONS:
            known = closest(self.activation, ACTIVATIONS)
            raise ValueError(f"adapters: unknown activation {self.activation!r}; {known}")
        if isinstance(self.after, str) or not self.after or set(self.after) - set(SUBLAYERS):
            raise ValueError(f"adapters: after must name some of {', '.join(SUBLAYERS)}, got {self.after!r}")
        object.__setattr__(self, "after", tuple(self.after))

    def within(self, parts: Collection[str]) -> Adapters | None:
        """Those behind sublayers that a stack of layers has; None where it has none of them."""
        after = tuple(name for name in self.after if name in parts)
        return dataclasses.replace(self, after=after) if after else None
