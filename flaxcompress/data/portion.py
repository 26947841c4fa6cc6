"""The last examples of training data, held out to validate on where no data of their own are given for that."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

_Item = TypeVar("_Item")


class Portion(NamedTuple):
    """Which examples of a source are read: all of them; all but the last `count`; or, `held_out`, those alone."""

    count: int = 0
    held_out: bool = False

    def of(self, examples: Iterable[_Item]) -> Iterator[_Item]:
        """The examples in their order; no more than `count` are kept in memory.

        Raises ValueError, at the end, where so many are held out that none is left.
        """
        if not self.count:
            yield from examples
            return
        last: collections.deque[_Item] = collections.deque()
        enough = False
        for example in examples:
            last.append(example)
            if len(last) > self.count:
                enough, first = True, last.popleft()
                if not self.held_out:
                    yield first
        if not enough:
            raise ValueError(
                f"data/hold_out: {self.count} examples are to be held out, but there are {len(last)}; hold out fewer"
            )
        if self.held_out:
            yield from last
