"""The runtimes that are compared: ours and its rivals."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import util

OWN = "flaxcompress"
RIVALS = {"torch": ("torch", "transformers")}  # name: the packages that it needs
INSTALL = "pip install 'flaxcompress[torch]'"


def installed(against: Sequence[str]) -> tuple[list[str], list[str]]:
    """The rivals that can run, and a note on each that cannot."""
    present, notes = [], []
    for rival in dict.fromkeys(against):
        missing = [package for package in RIVALS[rival] if util.find_spec(package) is None]
        if missing:
            notes.append(f"{rival}: left out, since {' and '.join(missing)} cannot be imported; install: {INSTALL}")
        else:
            present.append(rival)
    return present, notes
