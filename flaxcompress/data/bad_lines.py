"""Lines that cannot be read: counted, located, and skipped up to a limit."""

from __future__ import annotations

import logging
from types import TracebackType

log = logging.getLogger("flaxcompress")

_SHOWN = 3


class BadLines:
    """Skips lines that cannot be read, up to a limit; leaving the block, one warning says how many, and where.

        with BadLines(limit=100) as bad:
            for number, record in read_records(path, bad=bad): ...

    Attributes:
      count: how many there were so far.
      first: what was wrong with the first few: their files and lines.

    Raises ValueError (from the call) for one more than the limit; with limit 0 the line's own error.
    """

    def __init__(self, limit: int = 100):
        if limit < 0:
            raise ValueError(f"max_bad_lines: must be 0 or more, got {limit}")
        self.limit, self.count = limit, 0
        self.first: list[str] = []

    def __call__(self, error: ValueError) -> None:
        """Counts a line; `error` says which one and what is wrong with it."""
        if self.limit == 0:
            raise error
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(str(error))
        if self.count > self.limit:
            raise ValueError(
                f"more than {self.limit} lines cannot be read (max_bad_lines); the first: {'; '.join(self.first)}"
            )

    def __enter__(self) -> BadLines:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.count and error is None:
            log.warning("%d lines cannot be read and were skipped; the first: %s", self.count, "; ".join(self.first))
