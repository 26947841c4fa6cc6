"""Parallel texts: line i of one file is the translation of line i of the other."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flaxcompress.data.bad_lines import BadLines
from flaxcompress.data.documents import Source, is_record_source, source_files, source_records
from flaxcompress.data.readers import Bad, numbered_lines, parse_source, text_value

log = logging.getLogger("flaxcompress")


def read_parallel(source: Source, target: Source, *, max_bad_lines: int = 100) -> Iterator[tuple[str, str]]:
    """Yields (text, its translation); pairs with a blank or unreadable side are left out, with one warning.

    Args:
      source, target: a file of plain lines each, or columns ("FILE.tsv:en" and "FILE.tsv:de"; jsonl, parquet, and data
        sets of the Hub alike), or lists of such, or two lists of texts.

    Raises:
      FileNotFoundError: no such file.
      ValueError: different numbers of lines or files, nothing to read, too many bad lines.
    """
    files, others = source_files(source), source_files(target)
    if (files is None) != (others is None):
        raise ValueError("parallel texts: one side is files, the other texts: give the same kind for both")
    blank = found = 0
    with BadLines(max_bad_lines) as bad:
        for one, two in _pairs(source, target, files, others, bad):
            if one.strip() and two.strip():
                found += 1
                yield one, two
            else:
                blank += 1
    if not found:
        raise ValueError(f"parallel texts: {_name(files)} and {_name(others)} hold no pair of texts")
    if blank:
        log.warning("%d of %d pairs have a blank side and were left out", blank, blank + found)


def _pairs(source: Any, target: Any, files: Any, others: Any, bad: BadLines) -> Iterator[tuple[str, str]]:
    if files is None:
        one, two = list(source), list(target)
        if len(one) != len(two):
            raise ValueError(f"parallel texts: {len(one)} texts, but {len(two)} translations")
        yield from zip(one, two, strict=True)
        return
    if len(files) != len(others):
        raise ValueError(f"parallel texts: {len(files)} files, but {len(others)} of translations")
    for file, other in zip(files, others, strict=True):
        yield from _aligned(file, other, bad)


def _aligned(file: str | Path, other: str | Path, bad: BadLines) -> Iterator[tuple[str, str]]:
    """Pairs by line number: where one line cannot be read, both are left out."""
    names, skipped, numbers = (file, other), [0, 0], [0, 0]

    def counted(side: int) -> Bad:
        def count(error: ValueError) -> None:
            skipped[side] += 1
            bad(error)

        return count

    sides = [_numbered(name, counted(side)) for side, name in enumerate(names)]
    lines: list[tuple[int, str] | None] = [next(side, None) for side in sides]
    while (one := lines[0]) is not None and (two := lines[1]) is not None:
        if one[0] == two[0]:
            yield one[1], two[1]
        for side, behind in ((0, one[0] <= two[0]), (1, two[0] <= one[0])):
            if behind:
                numbers[side] += 1
                lines[side] = next(sides[side], None)
    for side in (0, 1):
        numbers[side] += (lines[side] is not None) + sum(1 for _ in sides[side])
    total = [n + s for n, s in zip(numbers, skipped, strict=True)]
    if total[0] != total[1]:
        raise ValueError(
            f"parallel texts: {names[0]} has {total[0]} lines, but {names[1]} has {total[1]}: line i of one must be "
            "the translation of line i of the other"
        )


def _numbered(file: str | Path, bad: Bad) -> Iterator[tuple[int, str]]:
    if not is_record_source(file):
        yield from numbered_lines(parse_source(file)[0], bad=bad)
        return
    name, column, records = source_records(file, bad=bad)
    if column is None:
        raise ValueError(f"{file}: name the column that holds the text, as in {file}:COLUMN")
    known = False
    for number, record in records:
        try:
            text = text_value(name, number, record, column)
        except ValueError as error:
            if not known:
                raise  # a misspelt column is no bad line
            bad(error)
            continue
        known = True
        yield number, text


def _name(files: Sequence[str | Path] | None) -> str:
    return "the texts" if files is None else ", ".join(map(str, files))
