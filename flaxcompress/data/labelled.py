"""Labelled texts: classes or numbers beside texts or pairs of texts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxcompress.config import closest
from flaxcompress.data.bad_lines import BadLines
from flaxcompress.data.documents import source_files, source_records
from flaxcompress.data.readers import Record, text_columns, text_value

_LOOK_AHEAD = 50


class Labelled(NamedTuple):
    """Texts and what is to be predicted of them.

    Attributes:
      texts: n texts, or pairs of texts.
      labels: [n] int32 classes, or float32 numbers.
      names: of the classes; empty where labels are numbers.
    """

    texts: Sequence[str] | Sequence[tuple[str, str]]
    labels: np.ndarray
    names: tuple[str, ...]


def read_labelled(
    source: str | Path | Sequence[str | Path],
    *,
    text: str | None = None,
    pair: str | None = None,
    label: str = "label",
    names: Sequence[str] | None = None,
    regression: bool = False,
    max_bad_lines: int = 100,
) -> Labelled:
    """Reads tsv, jsonl or parquet files, or data sets of the Hub, with a column of labels.

    Args:
      text, pair: the columns of the texts; by default those that `read_texts` finds.
      label: the column of the labels; of regression, of numbers.
      names: the classes in order, as they stand in the column; by default labels that are numbers are the classes
        themselves, and words are sorted. Give those of the training data where others are read.
      max_bad_lines: so many lines that cannot be read, or have a label that is not known, are skipped.

    Raises:
      FileNotFoundError: no such file.
      ValueError: an unknown column, no examples, too many bad lines, and what `read_texts` raises for a whole file.
    """
    files = source_files(source) or [source]
    texts: list[Any] = []
    labels: list[Any] = []
    with BadLines(max_bad_lines) as bad:
        for file in files:
            where, _, records = source_records(file, bad=bad)  # pyright: ignore[reportArgumentType]
            for content, value in _examples(where, records, text, pair, label, bad):
                try:
                    labels.append(_label(where, value, names, regression))
                except ValueError as error:
                    bad(error)
                else:
                    texts.append(content)
        if not texts:
            reason = f"; {bad.first[0]}" if bad.first else ""
            raise ValueError(f"{', '.join(map(str, files))}: holds no labelled texts{reason}")
    if regression:
        return Labelled(texts, np.array(labels, np.float32), ())
    found = find_names(labels) if names is None else tuple(names)
    numbers = {name: i for i, name in enumerate(found)}
    return Labelled(texts, np.array([numbers[name] for name in labels], np.int32), found)


def _examples(
    where: str, records: Iterator[Record], text: str | None, pair: str | None, label: str, bad: BadLines
) -> Iterator[tuple[Any, tuple[int, Any]]]:
    head = list(itertools.islice(records, _LOOK_AHEAD))
    columns = tuple(name for name in (text, pair) if name is not None)
    if not columns:
        rest = [{k: v for k, v in record.items() if k != label} for _, record in head]
        columns = text_columns(where, rest)
    for name in (*columns, label):
        if head and not any(name in record for _, record in head):
            raise ValueError(f"{where}: no column {name!r}; {closest(name, head[0][1])}")
    for number, record in itertools.chain(head, records):
        try:
            contents = tuple(text_value(where, number, record, name) for name in columns)
            value = _value(where, number, record, label)
        except ValueError as error:
            bad(error)
            continue
        (first, *others) = contents
        yield contents if others else first, (number, value)


def _value(where: str, number: int, record: Mapping[str, Any], label: str) -> Any:
    if record.get(label) is None:
        raise ValueError(f"{where}, line {number}: has no {label!r}")
    return record[label]


def _label(where: str, numbered: tuple[int, Any], names: Sequence[str] | None, regression: bool) -> Any:
    number, value = numbered
    if regression:
        try:
            found = float(value)
        except (TypeError, ValueError):
            found = math.nan
        if not math.isfinite(found):
            raise ValueError(f"{where}, line {number}: label {value!r:.40} is not a number")
        return found
    name = str(int(value)) if isinstance(value, (bool, int)) else str(value)
    if names is not None and name not in names:
        raise ValueError(f"{where}, line {number}: unknown label {name!r:.40}; {closest(name, names)}")
    return name


def find_names(labels: Sequence[str]) -> tuple[str, ...]:
    """The classes in order: 0, 1, … up to the highest where all labels are numbers, else the sorted words."""
    distinct = set(labels)
    if all(name.isdecimal() for name in distinct) and (highest := max(map(int, distinct))) < 10 * len(distinct) + 10:
        return tuple(str(i) for i in range(highest + 1))
    return tuple(sorted(distinct))
