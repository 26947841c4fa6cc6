"""Calibration text: what statistics, healing and fidelity are measured on, and the part that is held out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flaxcompress.data.docstrings import docstring_sentences
from flaxcompress.data.readers import read_texts
from flaxcompress.data.sentences import clean_sentences

LEAST_SENTENCES = 32
_LEAST_HELD_OUT = 11  # a sentence and its ten nearest neighbours, which fidelity compares
MOST_SENTENCES = 200_000  # reading stops there: no method gains from more, and memory stays bounded
_FILE_NAME = re.compile(r"[^\n]*\.(?:txt|text|md|tsv|csv|jsonl|ndjson|json)(?:\.gz)?(?::[^\s:/]+)?")

Source = str | Path | Iterable[str | Path]


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """Sentences to calibrate and heal on, and others to report on; both shuffled by their hash."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of all sentences and of how they are split; equal text has equal digests whatever its name."""
        found = hashlib.sha256()
        for part in (self.train, self.held_out):
            found.update(f"{len(part)}\n".encode())
            for sentence in part:
                found.update(_bytes(sentence) + b"\n")
        return found.hexdigest()


def calibration_text(
    source: CalibrationText | Source | None = None, *, seed: int = 0, held_out: int = 600
) -> CalibrationText:
    """Clean sentences from `source`, split into a part to train on and one that is held out.

    The order of each part, and which sentences are held out, follow from a hash of the sentence and `seed` alone, so
    they do not depend on the order of the source; any first n of them are a random sample.

    Args:
      source: None for the docstrings of Python's standard library; a file, or a list of files, each "FILE" or
        "FILE:column" (a list is one of files when its first item is an existing file, a Path, or ends like a text
        file); else texts. A `CalibrationText` is returned as it is.
      held_out: how many sentences are held out, but never more than a tenth of them, or 11 where that is less.

    Raises:
      ValueError: fewer than 32 usable sentences, or a file that cannot be read as `read_texts` says.
      FileNotFoundError: no such file.
    """
    if isinstance(source, CalibrationText):
        return source
    if held_out < 0:
        raise ValueError(f"calibration text: held_out must be 0 or more, got {held_out}")
    name, sentences = _sentences(source)
    found = list(itertools.islice(sentences, MOST_SENTENCES + 1))
    if len(found) > MOST_SENTENCES:
        found.pop()
        name = f"{name} (the first {MOST_SENTENCES:,} sentences)"
    if len(found) < LEAST_SENTENCES:
        raise ValueError(
            f"calibration text: {name}: found {len(found)} usable sentences (distinct, of 3 words or more), "
            f"at least {LEAST_SENTENCES} are needed; give more text, or none to use Python's docstrings"
        )
    found.sort(key=functools.partial(_hash, seed=seed))
    count = min(held_out, max(len(found) // 10, _LEAST_HELD_OUT))
    return CalibrationText(name=name, train=tuple(found[count:]), held_out=tuple(found[:count]))


def read_sentences(files: Sequence[str | Path]) -> Iterator[str]:
    """The distinct clean sentences of some files, each "FILE" or "FILE:column"; raises as `read_texts` does."""
    readers = [read_texts(file) for file in files]  # a missing file is found before any is read
    return clean_sentences(itertools.chain.from_iterable(readers))


def is_file_source(source: str | Path) -> bool:
    """Whether a string means a file: it exists, or ends like a text file, with or without ":column"."""
    if isinstance(source, Path) or _FILE_NAME.fullmatch(source) or os.path.exists(source):
        return True
    head = source.rpartition(":")[0]  # of a text, too: most have a colon somewhere
    return bool(head) and os.path.exists(head)


def source_name(files: Sequence[str | Path]) -> str:
    """The names of some files, without their folders."""
    return ", ".join(re.split(r"[/\\]", os.fspath(file))[-1] for file in files)


def _sentences(source: Source | None) -> tuple[str, Iterator[str]]:
    if source is None:
        version = ".".join(platform.python_version_tuple()[:2])
        return f"docstrings of Python {version}'s standard library", iter(docstring_sentences())
    if isinstance(source, (str, Path)):
        return source_name([source]), read_sentences([source])
    items: list[Any] = list(source)
    if items and isinstance(items[0], (str, Path)) and is_file_source(items[0]):
        return source_name(items), read_sentences(items)
    return f"{len(items):,} texts", clean_sentences(items)


def _bytes(sentence: str) -> bytes:
    return sentence.encode("utf-8", "surrogatepass")


def _hash(sentence: str, seed: int) -> bytes:
    return hashlib.blake2b(_bytes(f"{seed} {sentence}"), digest_size=16).digest()
