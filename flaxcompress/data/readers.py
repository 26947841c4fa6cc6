"""Texts from files: txt, tsv and jsonl, plain or gzip, and parquet, read as a stream with errors that name the line."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxcompress.config import closest
from flaxcompress.data.parquet import read_parquet

Pair = tuple[str, str, float]
Record = tuple[int, Mapping[str, Any]]  # the number of a line, or of a row, and its values by column
Bad = Callable[[ValueError], None]  # what becomes of a line that cannot be read; it is skipped where this returns
_TABLES = {".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_REFUSED = (".csv", ".json", ".arrow", ".zip", ".xz", ".bz2", ".zst")
_DEFAULT_COLUMNS = (("sentence",), ("text",), ("sentence1", "sentence2"))
_LOOK_AHEAD = 50  # rows looked at to find the column that holds text


def refuse(error: ValueError) -> None:
    """A `Bad` that raises at the first line that cannot be read."""
    raise error


def parse_source(source: str | Path) -> tuple[Path, str | None]:
    """Splits "FILE:column" into (path, column); column is None where none is named or where the whole is a file."""
    text = os.fspath(source)
    head, colon, column = text.rpartition(":")
    if isinstance(source, Path) or not colon or not head or os.path.exists(text) or re.search(r"[/\\]", column):
        return Path(text), None
    if not column:
        raise ValueError(f"{text}: no column is named after the colon; write {head} or {head}:COLUMN")
    return Path(head), column


def read_texts(path: str | Path, *, column: str | None = None) -> Iterator[str]:
    """Yields the texts of a file, blank ones left out.

    A tsv file starts with a header row and has no quoting; jsonl has one object per line; parquet has columns; every
    other file holds one text per line. All but parquet may be gzip (.gz). "FILE:column" names the column as `column`
    does.

    Args:
      column: the column, or jsonl field. By default "sentence", else "text", else "sentence1" and "sentence2", else
        the longest column that holds words.

    Raises:
      FileNotFoundError: no such file.
      ValueError: an empty or blank file, an unknown column, invalid UTF-8, damaged gzip or json, a row that does not
        fit the header; the message names the file and the line. Those beyond the first row are raised when reached.
    """
    path, named = parse_source(path)
    column = column or named
    kind = _kind(path)
    if kind == "txt":
        if column is not None:
            raise ValueError(
                f"{path}: column {column!r} is named, but only .tsv, .jsonl and .parquet files have columns"
            )
        return _not_blank(path, (line for _, line in _lines(path)))
    return _not_blank(path, _cells(path, column))


def read_records(path: str | Path, *, bad: Bad = refuse) -> Iterator[Record]:
    """Yields (line number, {column: value}) of a file, blank lines left out; a file of plain lines has a column "text".

    Raises FileNotFoundError and ValueError as `read_texts` does, except that `bad` is given the errors of single lines;
    those concerning a whole file, such as damaged gzip, are raised.
    """
    path = Path(path)
    kind = _kind(path)
    return _plain_records(path, bad) if kind == "txt" else _records(path, bad)


def numbered_lines(path: str | Path, *, bad: Bad = refuse) -> Iterator[tuple[int, str]]:
    """Yields (line number, line) of a text file, blank ones too; raises as `read_records` does."""
    path = Path(path)
    if (kind := _kind(path)) != "txt":
        raise ValueError(f"{path}: a file of plain lines is needed here, not {kind}")
    return _lines(path, bad)


def text_columns(where: str | Path, head: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The columns that hold text, judged by some records, as `read_texts` says. Raises ValueError where none does."""
    return _text_columns(Path(where), head)


def text_value(where: str | Path, number: int, record: Mapping[str, Any], name: str) -> str:
    """A text of a record. Raises ValueError where there is no such column or where it is no text."""
    return _text(Path(where), number, record, name)


def read_pairs(path: str | Path) -> list[Pair]:
    """The (sentence1, sentence2, score) rows of a tsv or jsonl file with these columns, as STS-B has them.

    Raises FileNotFoundError and ValueError as `read_texts` does, and ValueError for a score that is not a number.
    """
    path = Path(path)
    if _kind(path) == "txt":
        raise ValueError(f"{path}: sentence pairs are read from .tsv or .jsonl files with sentence1, sentence2, score")
    pairs = []
    for number, record in _records(path):
        first, second = (_text(path, number, record, name) for name in ("sentence1", "sentence2"))
        value = _value(path, number, record, "score")
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            raise ValueError(f"{path}, line {number}: score {value!r:.40} is not a number")
        pairs.append((first, second, score))
    if not pairs:
        raise ValueError(f"{path}: holds no sentence pairs")
    return pairs


def decode_lines(file: Iterable[bytes], name: str | Path, bad: Bad = refuse) -> Iterator[tuple[int, str]]:
    """(line number, line) of UTF-8 bytes, without a byte order mark; lines end at a newline and nowhere else.

    Gives `bad` a ValueError for invalid UTF-8, when it is reached; the message names the line of `name`.
    """
    for number, raw in enumerate(file, 1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            reason = f"byte 0x{raw[error.start]:02x} at position {error.start + 1}"
            bad(ValueError(f"{name}, line {number}: not valid UTF-8 ({reason}); convert it, for example with iconv"))
            continue
        yield number, (line.removeprefix("\ufeff") if number == 1 else line).rstrip("\r\n")


def _kind(path: Path) -> str:
    """Checks that `path` can hold text; "txt", "tsv" or "jsonl"."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give a file (txt, tsv or jsonl, plain or .gz, or parquet)")
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix.lower() in _REFUSED:
        raise ValueError(f"{path}: {suffix} files are not read; convert to .txt, .tsv or .jsonl (each plain or .gz)")
    return _TABLES.get(suffix.lower(), "txt")


def _lines(path: Path, bad: Bad = refuse) -> Iterator[tuple[int, str]]:
    """(line number, line) of a UTF-8 file."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in decode_lines(file, path, bad):
                yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{path}, after line {number}: damaged gzip ({reason}); fetch or pack it again") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None


def _plain_records(path: Path, bad: Bad) -> Iterator[Record]:
    return ((number, {"text": line}) for number, line in _lines(path, bad) if line.strip())


def _records(path: Path, bad: Bad = refuse) -> Iterator[Record]:
    """(line number, {column: value}) of a tsv or jsonl file, or (row number, …) of a parquet file."""
    kind = _kind(path)
    if kind == "parquet":
        yield from read_parquet(path)
        return
    header: list[str] | None = None
    for number, line in _lines(path, bad):
        if not line.strip():
            continue
        try:
            if kind == "jsonl":
                record = _json_object(path, number, line)
            elif header is None:
                header = [name.strip() for name in line.split("\t")]
                continue
            else:
                record = _row(path, number, line, header)
        except ValueError as error:
            bad(error)
            continue
        yield number, record


def _row(path: Path, number: int, line: str, header: list[str]) -> Mapping[str, Any]:
    cells = line.split("\t")
    if len(cells) != len(header):
        raise ValueError(
            f"{path}, line {number}: {len(cells)} columns, but the header has {len(header)} "
            f"({_short(header)}); columns are separated by tabs, without quoting"
        )
    return dict(zip(header, cells, strict=True))


def _json_object(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: damaged JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError(f"{path}, line {number}: JSON nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}, line {number}: a JSON object is expected on every line, got {line!r:.40}")
    return record


def _cells(path: Path, column: str | None) -> Iterator[str]:
    records = _records(path)
    head = list(itertools.islice(records, _LOOK_AHEAD))
    columns = (column,) if column is not None else _text_columns(path, [record for _, record in head])
    for number, record in itertools.chain(head, records):
        for name in columns:
            yield _text(path, number, record, name)


def _text_columns(path: Path, head: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    names = list(head[0]) if head else []
    for wanted in _DEFAULT_COLUMNS:
        if wanted[0] in names:
            return tuple(name for name in wanted if name in names)
    if len(names) == 1:
        return tuple(names)
    length = {}
    for name in names:
        values = [record.get(name) for record in head]
        texts = [value for value in values if isinstance(value, str)]
        if len(texts) == len(values) and sum(len(text.split()) for text in texts) > len(texts):
            length[name] = sum(map(len, texts))
    if head and not length:
        raise ValueError(
            f"{path}: no column looks like text; name one, as in {path.name}:COLUMN; known: {_short(names)}"
        )
    return (max(length, key=length.__getitem__),) if length else ()


def _value(path: Path, number: int, record: Mapping[str, Any], name: str) -> Any:
    if name not in record:
        raise ValueError(f"{path}, line {number}: no column {name!r}; {closest(name, (n[:40] for n in record))}")
    return record[name]


def _text(path: Path, number: int, record: Mapping[str, Any], name: str) -> str:
    value = _value(path, number, record, name)
    if not isinstance(value, str):
        raise ValueError(f"{path}, line {number}: {name!r} is {type(value).__name__}, not text: {value!r:.40}")
    return value


def _not_blank(path: Path, texts: Iterable[str]) -> Iterator[str]:
    found = False
    for text in texts:
        if text.strip():
            found = True
            yield text
    if not found:
        raise ValueError(f"{path}: holds no text, only blank lines or a header")


def _short(names: list[str]) -> str:
    return ", ".join(name[:40] for name in names)
