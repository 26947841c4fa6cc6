"""Packing: several short examples in one row, so that few tokens are padding (Krell et al. 2021)."""

from __future__ import annotations

import bisect
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Bins(NamedTuple):
    """Which examples stand in each row.

    Attributes:
      examples: the examples of all rows, row after row.
      starts: where each row begins in `examples`, and their number.
    """

    examples: Int[np.ndarray, " n"]
    starts: Int[np.ndarray, " rows+1"]


def pack_lengths(lengths: Int[np.ndarray, " n"], limit: int) -> list[tuple[int, tuple[int, ...]]]:
    """(how often, lengths) of the rows that hold examples of these lengths, none longer than `limit` in all.

    Best fit from the longest to the shortest: an example goes to the fullest row that still has room. All examples of
    one length, and all rows alike, are placed at once: the time depends on the lengths that occur, not on n.

    Raises ValueError for an example longer than `limit`.
    """
    sizes, counts = np.unique(np.asarray(lengths, np.int64), return_counts=True)
    if sizes.size and (sizes[-1] > limit or sizes[0] < 1):
        raise ValueError(f"packing: lengths must be 1 to {limit}, got {sizes[0]} to {sizes[-1]}")
    rows: dict[int, dict[tuple[int, ...], int]] = {}  # room left -> lengths in the row -> how many such rows
    rooms: list[int] = []  # sorted keys of `rows`

    def put(room: int, row: tuple[int, ...], count: int) -> None:
        if room not in rows:
            bisect.insort(rooms, room)
            rows[room] = {}
        rows[room][row] = rows[room].get(row, 0) + count

    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count and (place := bisect.bisect_left(rooms, size)) < len(rooms):
            room = rooms[place]
            row, many = rows[room].popitem()
            each = min(room // size, count)  # the row just added to is the fullest, while it has room
            used = min(many, count // each)
            if many > used:
                rows[room][row] = many - used
            if not rows[room]:
                del rows[room], rooms[place]
            put(room - each * size, (*row, *(size,) * each), used)
            count -= each * used
        each = limit // size  # rows of this length alone
        if count >= each:
            put(limit - each * size, (size,) * each, count // each)
        if count % each:
            put(limit - count % each * size, (size,) * (count % each), 1)
    return [(many, row) for room in rooms for row, many in rows[room].items()]


class Packing:
    """Rows of examples, the same kinds of rows in every epoch, with other examples of the same lengths in them.

    The number of rows is therefore the same in every epoch.
    """

    def __init__(self, lengths: Int[np.ndarray, " n"], limit: int):
        lengths = np.asarray(lengths, np.int64)
        patterns = pack_lengths(lengths, limit)
        self._by_length = np.argsort(lengths, kind="stable")  # examples, sorted by their lengths
        sizes = np.repeat([len(row) for _, row in patterns], [many for many, _ in patterns])
        slots = np.concatenate([np.tile(row, many) for many, row in patterns] or [np.zeros(0, np.int64)])
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self._slots = np.argsort(slots, kind="stable")  # places, sorted by the lengths that belong there
        self._lengths = lengths[self._by_length]
        self.rows = len(sizes)

    def bins(self, rng: np.random.Generator | None) -> Bins:
        """The rows of an epoch; without `rng`, examples of one length keep their order."""
        by_length = self._by_length
        if rng is not None:
            shuffled = rng.permutation(len(by_length))
            by_length = by_length[shuffled[np.argsort(self._lengths[shuffled], kind="stable")]]
        examples = np.empty(len(by_length), np.int64)
        examples[self._slots] = by_length
        return Bins(examples, self.starts)
