"""Words with a tag each, sentence by sentence: files in the manner of CoNLL-2003."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flaxcompress.data.readers import numbered_lines

_DOCUMENT = "-DOCSTART-"  # the word of a line that only says that a document begins


class Tagged(NamedTuple):
    """Sentences: the words of each, and a tag for every word."""

    words: list[list[str]]
    tags: list[list[str]]


def read_conll(path: str | Path) -> Tagged:
    """Reads a word per line, first, and its tag, last, with tabs (or blanks) between; blank lines end sentences.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line without a tag, no sentence, and what `read_texts` raises for a whole file.
    """
    found = Tagged([], [])
    for rows in _sentences(path):
        words, tags = zip(*rows, strict=True)
        found.words.append(list(words))
        found.tags.append(list(tags))
    if not found.words:
        raise ValueError(f"{path}: holds no sentence, only blank lines")
    return found


def _sentences(path: str | Path) -> Iterator[list[tuple[str, str]]]:
    rows: list[tuple[str, str]] = []
    for number, line in numbered_lines(path):
        cells = [cell.strip() for cell in line.split("\t")] if "\t" in line.strip() else line.split()
        if cells and cells[0] == _DOCUMENT:
            continue
        if not any(cells):
            if rows:
                yield rows
            rows = []
            continue
        if len(cells) < 2 or not cells[0] or not cells[-1]:
            raise ValueError(f"{path}, line {number}: a word and its tag are expected, got {line!r:.60}")
        rows.append((cells[0], cells[-1]))
    if rows:
        yield rows
