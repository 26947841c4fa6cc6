"""Sharing maps that have a name."""

from __future__ import annotations

import math
from collections.abc import Callable

from flaxcompress.config.names import closest

Map = tuple[int, ...]


def _own(layers: int, sets: int) -> Map:
    return tuple(range(layers))


def _one(layers: int, sets: int) -> Map:
    return (0,) * layers


def _sequence(layers: int, sets: int) -> Map:
    return tuple(layer * sets // layers for layer in range(layers))


def _cycle(layers: int, sets: int) -> Map:
    return tuple(layer % sets for layer in range(layers))


def _cycle_rev(layers: int, sets: int) -> Map:
    last = sets * (math.ceil(layers / sets) - 1)  # the last turn runs backwards, unless it is the only one
    return tuple(layer % sets if layer < max(last, sets) else sets - 1 - layer % sets for layer in range(layers))


def _pairs(layers: int, sets: int) -> Map:
    return tuple(layer // 2 for layer in range(layers))


# Sequence, cycle and cycle_rev are those of Takase & Kiyono 2021, figure 2; pairs those of MobileLLM (Liu et al. 2024).
_FREE: dict[str, Callable[[int, int], Map]] = {"sequence": _sequence, "cycle": _cycle, "cycle_rev": _cycle_rev}
_FIXED: dict[str, Callable[[int, int], Map]] = {"own": _own, "all": _one, "pairs": _pairs}
_ONE_PART = ("attention", "feed_forward")
NAMES = (*_FIXED, *_FREE, *_ONE_PART)
NORM_SHARING = ("shared", "own")


def named_maps(name: str, layers: int, sets: int | None, norms: str) -> dict[str, Map]:
    """{part: map} of attention, feed_forward and norms.

    Raises ValueError for unknown names, and for a number of sets that contradicts the name.
    """
    for value, known, what in ((name, NAMES, "name"), (norms, NORM_SHARING, "norms")):
        if value not in known:
            raise ValueError(f"sharing: unknown {what} {value!r}; {closest(str(value), known)}")
    if not isinstance(layers, int) or layers < 1:
        raise ValueError(f"sharing: layers must be a positive integer, got {layers!r}")
    if name in _FREE:
        if not isinstance(sets, int) or isinstance(sets, bool) or not 1 <= sets <= layers:
            raise ValueError(f"sharing: {name!r} needs sets, from 1 to the {layers} layers, got {sets!r}")
        shared = _FREE[name](layers, sets)
    else:
        shared = _FIXED.get(name, _one)(layers, 0)
        if sets is not None and sets != (stored := max(shared) + 1):
            raise ValueError(f"sharing: {name!r} of {layers} layers stores {stored} sets, got {sets!r}; leave sets out")
    own = _own(layers, 0)
    parts = (name,) if name in _ONE_PART else _ONE_PART
    maps = {part: shared if part in parts else own for part in _ONE_PART}
    return {**maps, "norms": own if norms == "own" or name in _ONE_PART else shared}
