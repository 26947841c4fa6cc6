"""Documents of any source: files, data sets of the Hub, or texts in memory."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxcompress.data.bad_lines import BadLines
from flaxcompress.data.calibration import is_file_source
from flaxcompress.data.hub import PREFIX, HubData
from flaxcompress.data.portion import Portion
from flaxcompress.data.readers import (
    Bad,
    Record,
    numbered_lines,
    parse_source,
    read_records,
    text_columns,
    text_value,
)

Source = str | Path | Iterable[str | Path]
_LOOK_AHEAD = 50  # records looked at to find the columns that hold text
_LINES = (".tsv", ".jsonl", ".ndjson", ".parquet")  # files of records; in all others a document may have many lines


def is_source_name(source: Any) -> bool:
    """Whether a string or Path means a file or a data set of the Hub, not a text."""
    return isinstance(source, Path) or source.startswith(PREFIX) or is_file_source(source)


def source_files(source: Source) -> list[str | Path] | None:
    """The files and Hub data sets that a source names; None where it is texts in memory."""
    if isinstance(source, (str, Path)):
        return [source]
    items: Sequence[Any] = source if isinstance(source, Sequence) else ()
    return list(items) if items and isinstance(items[0], (str, Path)) and is_source_name(items[0]) else None


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text to train on, and how it is read.

    Attributes:
      source: a file, "FILE" or "FILE:column" as `read_texts` reads them, a data set of the Hub ("hf:owner/name", see
        `HubData`), a list of these, or texts, each of which is a document.
      column: the column that holds the text, where the source's name has none.
      separator: what stands between the documents of a file of plain lines: None, every line is a document; "", blank
        lines; else a mark, such as "<|endoftext|>".
      max_bad_lines: so many lines that cannot be read (invalid UTF-8, damaged json, rows that do not fit the header)
        are skipped, with one warning that says where the first are.
      cache: a folder where the tokens of files are kept, and found again while files and tokenizer stay the same (those
        of the Hub's data sets by their names alone); they are then read from there, not held in memory. Processes may
        share it.
      portion: which of the documents.
    """

    source: Source
    column: str | None = None
    separator: str | None = None
    max_bad_lines: int = 100
    cache: Path | None = None
    portion: Portion = Portion()  # noqa: RUF009  (a tuple, never changed)

    @property
    def files(self) -> list[str | Path] | None:
        """The files and Hub data sets; None where the source is texts in memory."""
        return source_files(self.source)

    def documents(self) -> Iterator[str]:
        """Yields the documents, blank ones left out.

        Raises:
          FileNotFoundError: no such file.
          ValueError: nothing but blank lines, too many bad ones, all documents held out, and what `read_texts` raises
            for a whole file.
          TypeError: a text in memory is not a string.
        """
        return self.portion.of(self._all_documents())

    def _all_documents(self) -> Iterator[str]:
        files = self.files
        if files is None:
            yield from _texts(self.source)  # pyright: ignore[reportArgumentType]
            return
        with BadLines(self.max_bad_lines) as bad:
            for file in files:
                empty = True
                for text in _documents(file, self.column, self.separator, bad):
                    if text.strip():
                        empty = False
                        yield text
                if empty:
                    raise ValueError(f"{file}: holds no text" + (f"; {bad.first[0]}" if bad.first else ""))


def as_corpus(source: Corpus | Source) -> Corpus:
    """A source with the usual way to read it."""
    return source if isinstance(source, Corpus) else Corpus(source)


def source_records(source: str | Path, *, bad: Bad) -> tuple[str, str | None, Iterator[Record]]:
    """(name, column that the source names, records) of a file or of a data set of the Hub."""
    if isinstance(source, str) and source.startswith(PREFIX):
        found = HubData.parse(source)
        return f"{PREFIX}{found.name}", found.column, found.records()
    path, column = parse_source(source)
    return str(path), column, read_records(path, bad=bad)


def _texts(texts: Iterable[Any]) -> Iterator[str]:
    found = False
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {number} is {type(text).__name__}, not a string: {text!r:.80}")
        if text.strip():
            found = True
            yield text
    if not found:
        raise ValueError("no texts were given, or only blank ones")


def _documents(file: str | Path, column: str | None, separator: str | None, bad: Bad) -> Iterator[str]:
    if not is_record_source(file):
        path, named = parse_source(file)
        if named or column:
            raise ValueError(f"{path}: column {named or column!r} is named, but this is a file of plain lines")
        lines = (line for _, line in numbered_lines(path, bad=bad))
        return lines if separator is None else _split(lines, separator)
    name, named, records = source_records(file, bad=bad)
    return _cells(name, named or column, records, bad)


def is_record_source(file: str | Path) -> bool:
    """Whether a source has columns; every other one has plain lines."""
    if isinstance(file, str) and file.startswith(PREFIX):
        return True
    path = os.fspath(parse_source(file)[0]).removesuffix(".gz")
    return path.lower().endswith(_LINES)


def _split(lines: Iterable[str], separator: str) -> Iterator[str]:
    """Joins lines up to a blank line, or to `separator`, which may stand anywhere in a line."""
    waiting: list[str] = []
    for line in lines:
        if not separator and not line.strip():
            yield "\n".join(waiting)
            waiting = []
            continue
        *ended, rest = line.split(separator) if separator else [line]
        for part in ended:
            yield "\n".join([*waiting, part])
            waiting = []
        waiting.append(rest)
    yield "\n".join(waiting)


def _cells(name: str, column: str | None, records: Iterator[Record], bad: Bad) -> Iterator[str]:
    head = list(itertools.islice(records, _LOOK_AHEAD))
    columns = (column,) if column is not None else text_columns(name, [record for _, record in head])
    for number, record in itertools.chain(head, records):
        for wanted in columns:
            try:
                text = text_value(name, number, record, wanted)
            except ValueError as error:
                if not _known(head, wanted):
                    raise  # a misspelt column is no bad line
                bad(error)
                continue
            yield text


def _known(head: Sequence[tuple[int, Mapping[str, Any]]], column: str) -> bool:
    return any(column in record for _, record in head)
