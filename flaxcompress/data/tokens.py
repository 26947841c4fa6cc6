"""Tokenized text as flat arrays: any stretch of it is read at random, from memory or from files."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Integer

from flaxcompress.data.frame import check_vocabulary, whole_tokenizer
from flaxcompress.text import Assets

_CHUNK = 1024  # documents tokenized together
_WORD = np.dtype(np.bool_)
_PLACE = np.dtype(np.int64)


class Tokens(NamedTuple):
    """The tokens of documents, one after the other; a document has units, such as sentences.

    Attributes:
      ids: N tokens, uint16 where the vocabulary allows it.
      words: whether a token begins a word, as the tokenizer cuts words; empty where that was not asked for.
      units: where each of U units begins in `ids`, and N.
      documents: where each of D documents begins in `units`, and U.
    """

    ids: Integer[np.ndarray, " N"]
    words: Bool[np.ndarray, " N"]
    units: Int[np.ndarray, " U+1"]
    documents: Int[np.ndarray, " D+1"]

    @property
    def document_places(self) -> Int[np.ndarray, " D+1"]:
        """Where each document begins in `ids`, and N."""
        return self.units[self.documents]


def tokenize_documents(
    documents: Iterable[Sequence[str]],
    assets: Assets,
    *,
    before: Sequence[int] = (),
    after: Sequence[int] = (),
    words: bool = False,
    vocabulary: int | None = None,
    folder: Path | None = None,
) -> Tokens:
    """Tokenizes documents, each a list of units, without the tokenizer's own special tokens.

    Args:
      before, after: ids put before and after every document.
      words: whether to note where words begin.
      vocabulary: the model's.
      folder: where the arrays are written, to be read from there; None: they are kept in memory.

    Raises ValueError for ids that the model does not have, and where no document has a token.
    """
    tokenizer = whole_tokenizer(assets)
    columns = [_Column(dtype, folder, n) for n, dtype in zip(Tokens._fields, _dtypes(tokenizer), strict=True)]
    ids, starts, units, ends = columns
    total = count = 0  # tokens and units so far
    units.add([0])
    ends.add([0])
    for chunk in _chunks(documents):
        encodings = iter(tokenizer.encode_batch([u for document in chunk for u in document], add_special_tokens=False))
        for document in chunk:
            rows = [next(encodings) for _ in document]
            rows = [row for row in rows if row.ids]
            if not rows:
                continue
            pieces = [list(row.ids) for row in rows]
            if words:
                found = [_word_starts(row, tokenizer) for row in rows]
                starts.add([True] * len(before) + [mark for row in found for mark in row] + [True] * len(after))
            pieces[0] = [*before, *pieces[0]]
            pieces[-1] += after
            check_vocabulary(max(map(max, pieces)), vocabulary)
            for piece in pieces:
                ids.add(piece)
                total += len(piece)
                units.add([total])
            count += len(pieces)
            ends.add([count])
    if not count:
        raise ValueError("training data: the documents hold no token")
    return Tokens(*(column.done() for column in columns))


def open_tokens(folder: Path) -> Tokens:
    """What `tokenize_documents` wrote to a folder. Raises FileNotFoundError where it wrote nothing."""
    found = list(folder.glob("ids.*"))
    if not found:
        raise FileNotFoundError(f"{folder}: holds no tokens")
    dtypes = (np.dtype(found[0].suffix[1:]), _WORD, _PLACE, _PLACE)
    return Tokens(*(_read(_path(folder, n, d), d) for n, d in zip(Tokens._fields, dtypes, strict=True)))


def _dtypes(tokenizer: Any) -> tuple[np.dtype, ...]:
    small = tokenizer.get_vocab_size(with_added_tokens=True) <= 1 << 16
    return np.dtype(np.uint16 if small else np.int32), _WORD, _PLACE, _PLACE


class _Column:
    """A growing array, in memory or in a file."""

    def __init__(self, dtype: np.dtype, folder: Path | None, name: str):
        self._dtype = dtype
        self._path = None if folder is None else _path(folder, name, dtype)
        self._file = io.BytesIO() if self._path is None else self._path.open("wb")

    def add(self, values: Sequence[Any]) -> None:
        self._file.write(np.asarray(values, self._dtype).tobytes())

    def done(self) -> np.ndarray:
        if self._path is None:
            return np.frombuffer(self._file.getbuffer(), self._dtype)  # pyright: ignore[reportAttributeAccessIssue]
        self._file.close()
        return _read(self._path, self._dtype)


def _path(folder: Path, name: str, dtype: np.dtype) -> Path:
    return folder / f"{name}.{dtype.name}"


def _read(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r")


def _chunks(documents: Iterable[Sequence[str]]) -> Iterator[list[Sequence[str]]]:
    chunk: list[Sequence[str]] = []
    for document in documents:
        chunk.append(document)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _word_starts(encoding: Any, tokenizer: Any) -> list[bool]:
    """Whether each token begins a word; a tokenizer that cuts no words marks them by the blank before them."""
    if tokenizer.pre_tokenizer is None:
        return [i == 0 or token.startswith("▁") for i, token in enumerate(encoding.tokens)]
    words = encoding.word_ids
    return [i == 0 or word is None or word != words[i - 1] for i, word in enumerate(words)]
