"""Progress: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

LINES_APART = 60.0  # seconds; what is over sooner writes none


@contextlib.contextmanager
def progress_bar(label: str, total: int | None, *, show: bool) -> Iterator[Callable[..., None]]:
    """Yields `advance(count=1, note="")`.

    When `show`, it moves a bar with the time left on stderr; where that is no terminal, it writes a line there every
    minute.
    """
    if not show:
        yield lambda count=1, note="": None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _Lines(label, total).advance
        return
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(label, total=total, note="")
        yield lambda count=1, note="": bars.update(task, advance=count, note=note)


class _Lines:
    """What a bar shows, as lines: "training: 1,200 of 10,000, 0:31:05 left, loss 2.3412"."""

    def __init__(self, label: str, total: int | None):
        self._label, self._total = label, total
        self._done = 0
        self._said = (time.monotonic(), None)  # when, and how much was done; None: before the first call

    def advance(self, count: int = 1, note: str = "") -> None:
        """Counts; writes a line where the last one is long ago."""
        when, before = self._said
        if before is None:  # the first call may count what an earlier run did
            before = self._done + count
            self._said = (when, before)
        self._done += count
        now = time.monotonic()
        if now - when < LINES_APART:
            return
        said = [f"{self._label}: {self._done:,}" + (f" of {self._total:,}" if self._total is not None else "")]
        if self._total is not None and self._done > before:
            left = (self._total - self._done) * (now - when) / (self._done - before)
            said.append(f"{_clock(left)} left")
        print(", ".join([*said, *([note] if note else [])]), file=sys.stderr, flush=True)
        self._said = (now, self._done)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
