"""Cross-layer parameter sharing: which layer uses which weight set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from flaxcompress.config.named_sharing import named_maps
from flaxcompress.config.names import reject_unknown

SUBLAYERS = ("attention", "cross_attention", "feed_forward")
PARTS = (*SUBLAYERS, "norms", "deltas", "bases")
_ALWAYS = ("attention", "feed_forward", "norms")
_NAMED = ("name", "sets", "norms", "cross_attention")


class Sets(NamedTuple):
    """The weight set of each part that one layer uses; 0 for a part that it does not have."""

    attention: int = 0
    cross_attention: int = 0
    feed_forward: int = 0
    norms: int = 0
    deltas: int = 0
    bases: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharing:
    """Which weight set each of the L layers uses, part by part; a part that layers do not have has an empty map.

    A map such as (0, 1, 0, 1) stores two sets and uses each twice. Sets are numbered in order of
    first use, so a map of distinct numbers means that every layer owns its part. `bases` holds the left factors that
    low-rank kernels of several layers have in common (see `formats/basis.py`).
    """

    attention: tuple[int, ...]
    feed_forward: tuple[int, ...]
    norms: tuple[int, ...]
    cross_attention: tuple[int, ...] = ()
    deltas: tuple[int, ...] = ()
    bases: tuple[int, ...] = ()

    @classmethod
    def own(cls, layers: int, *, cross_attention: bool = False) -> Sharing:
        """Every layer has weights of its own."""
        each = tuple(range(layers))
        return cls(attention=each, feed_forward=each, norms=each, cross_attention=each if cross_attention else ())

    @classmethod
    def named(
        cls, name: str, *, layers: int, sets: int | None = None, norms: str = "shared", cross_attention: bool = False
    ) -> Sharing:
        """The maps that have a name.

        Args:
          name: "own"; "all" layers share everything; "attention" or "feed_forward" alone is shared by all; "sequence"
            (neighbours: 0 0 1 1 2 2), "cycle" (0 1 2 0 1 2) and "cycle_rev" (0 1 2 2 1 0) of Takase & Kiyono 2021;
            "pairs" of neighbours.
          sets: M, the number of stored sets of "sequence", "cycle" and "cycle_rev".
          norms: "own" norms beside shared matrices, or "shared" ones by the same map; with "attention" and
            "feed_forward" they are every layer's own.
          cross_attention: whether layers attend to an encoder: by the map of attention.

        Raises ValueError for unknown names, with the closest one, and for a number of sets that makes no sense.
        """
        maps = named_maps(name, layers, sets, norms)
        return cls(**maps, cross_attention=maps["attention"] if cross_attention else ())

    def __post_init__(self):
        lengths = {part: len(getattr(self, part)) for part in PARTS}
        if len({n for part, n in lengths.items() if n or part in _ALWAYS}) != 1:
            raise ValueError(f"sharing: every map needs one entry per layer, got lengths {lengths}")
        for part in PARTS:
            sets = tuple(int(s) for s in getattr(self, part))
            object.__setattr__(self, part, sets)
            first_uses = list(dict.fromkeys(sets))
            if first_uses != list(range(len(first_uses))):
                raise ValueError(
                    f"sharing/{part}: {list(sets)} must number its weight sets 0, 1, 2, … in order of first use"
                )

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that layers have."""
        return tuple(part for part in PARTS if getattr(self, part))

    def sets(self, part: str) -> int:
        """The number of stored weight sets of `part`."""
        return max(getattr(self, part)) + 1

    def of_layer(self, layer: int) -> Sets:
        """The weight sets that a layer uses."""
        return Sets(**{part: getattr(self, part)[layer] for part in self.parts})

    def to_json(self) -> dict[str, list[int]]:
        """The maps of the parts that layers have."""
        return {part: list(getattr(self, part)) for part in self.parts}


def read_sharing(data: Any, where: str, layers: Any = None) -> Sharing:
    """Reads `Sharing.to_json`'s object, or a name, alone or with `Sharing.named`'s arguments: {"name": "cycle", …}.

    Raises ValueError for unknown and missing parts.
    """
    if isinstance(data, str) or (isinstance(data, Mapping) and "name" in data):
        options: dict[str, Any] = {"name": data} if isinstance(data, str) else dict(data)
        reject_unknown(where, options, _NAMED)
        return Sharing.named(**options, layers=layers)
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: expected an object, got {data!r}")
    reject_unknown(where, data, PARTS)
    if without := [p for p in _ALWAYS if p not in data]:
        raise ValueError(f"{where}: missing {', '.join(without)}")
    return Sharing(**{part: tuple(sets) for part, sets in data.items()})
