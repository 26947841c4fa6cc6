"""Images as sequences."""

from __future__ import annotations

import dataclasses

from flaxcompress.config.part import Part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patches(Part):
    """An image's patches as tokens: `size`×`size` pixels each of an image [channels, height, width]."""

    height: int
    width: int
    size: int
    channels: int = 3

    def __post_init__(self):
        for name in ("height", "width", "size", "channels"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"patches: {name} must be a positive integer, got {getattr(self, name)!r}")
        if min(self.grid) < 1:
            raise ValueError(f"patches: an image of {self.height}×{self.width} has no patch of {self.size}×{self.size}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.height // self.size, self.width // self.size

    @property
    def count(self) -> int:
        """Patches in all."""
        return self.grid[0] * self.grid[1]
