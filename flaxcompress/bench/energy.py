"""The energy that the processor has used."""

from __future__ import annotations

from pathlib import Path

_POWER = Path("/sys/class/powercap")


class Energy:
    """The processor packages' energy counters, which count microjoules and wrap around."""

    def __init__(self):
        self._counters: list[tuple[Path, int]] = []
        for folder in sorted(_POWER.glob("intel-rapl:*")):
            if folder.name.count(":") != 1:
                continue  # a part of a package
            try:
                int((folder / "energy_uj").read_text())
                limit = int((folder / "max_energy_range_uj").read_text())
            except (OSError, ValueError):
                self._counters = []  # half of the packages would mislead
                break
            self._counters.append((folder / "energy_uj", limit))

    @property
    def readable(self) -> bool:
        return bool(self._counters)

    def read(self) -> list[int]:
        return [int(file.read_text()) for file, _ in self._counters]

    def since(self, before: list[int]) -> float:
        used = 0
        for now, then, (_, limit) in zip(self.read(), before, self._counters, strict=True):
            used += now - then if now >= then else now - then + limit
        return used / 1e6
