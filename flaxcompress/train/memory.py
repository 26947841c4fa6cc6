"""Which way of making a step fits a device's memory: found by compiling it, before anything runs."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from flaxcompress.nn.remat import REMAT
from flaxcompress.train.placement import OneDevice
from flaxcompress.train.state import State
from flaxcompress.train.step import Recipe

log = logging.getLogger("flaxcompress")

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
REMAT_ORDER = ("none", "dots", "full")  # from the one that wastes nothing to the one that computes most again
assert set(REMAT_ORDER) == set(REMAT)


def parse_bytes(text: str | int) -> int:
    """ "12GB" or 12000000000 -> 12000000000 (KB, MB, GB: powers of 10; KiB, MiB, GiB: of 2)."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([kmg]i?b|)\s*", str(text), re.IGNORECASE)
    try:
        size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"memory_limit: expected a size such as 12GB or 800MiB, got {text!r}")
    return size


def ways(remat: str, accumulate: int, rows: int) -> list[tuple[str, int]]:
    """(remat, accumulate) to try, the fastest first: more is computed again, then microbatches are halved."""
    found = []
    while rows % accumulate == 0:
        found += [(kind, accumulate) for kind in REMAT_ORDER[REMAT_ORDER.index(remat) :]]
        accumulate *= 2
    return found


def step_bytes(place: OneDevice, recipe: Recipe, state: State, *inputs: Any) -> int:
    """What a device needs at most while it runs a step: inputs, results that replace none of them, and in between."""
    needed = program_bytes(place.lower(recipe, state, *inputs).compile())
    if needed is None:
        raise ValueError("memory_limit: this device's compiler does not tell how much memory a program takes")
    return sum(needed)


def program_bytes(compiled: Any) -> tuple[int, int] | None:
    """(bytes of inputs and of results that replace none of them, bytes in between) of a program, per device."""
    if (found := compiled.memory_analysis()) is None:
        return None
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return int(held), int(found.temp_size_in_bytes)


def first_that_fits(
    recipes: Sequence[Recipe], names: Sequence[str], limit: int, place: OneDevice, state: State, *inputs: Any
) -> Recipe:
    """The first recipe whose step takes at most `limit` bytes of each device.

    Raises ValueError where none does, with what the smallest takes.
    """
    least = None
    for recipe, name in zip(recipes, names, strict=True):
        size = step_bytes(place, recipe, state, *inputs)
        if size <= limit:
            log.warning("memory: a step with %s takes %.1f MB of %.1f", name, size / 1e6, limit / 1e6)
            return recipe
        least = (size, name) if least is None else min(least, (size, name))
    assert least is not None
    raise ValueError(
        f"memory_limit: {limit / 1e6:.1f} MB are too little; the smallest step, with {least[1]}, takes "
        f"{least[0] / 1e6:.1f} MB: use more devices, a smaller batch or an optimizer with less state"
    )
