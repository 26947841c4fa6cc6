"""Tokenized texts, or pairs of them, each as one row that a model reads, special tokens included."""

from __future__ import annotations

import itertools
import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from flaxcompress.data.frame import check_vocabulary
from flaxcompress.text import Assets
from flaxcompress.tokenizer import make_tokenizer

log = logging.getLogger("flaxcompress")

_CHUNK = 1024  # texts tokenized together


class Rows(NamedTuple):
    """Rows of tokens, one after the other.

    Attributes:
      ids: of N tokens.
      types: their token types, 1 in the second text of a pair where the tokenizer tells them apart.
      starts: where each row begins, and N.
    """

    ids: Integer[np.ndarray, " N"]
    types: Integer[np.ndarray, " N"]
    starts: Int[np.ndarray, " n+1"]

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        """Tokens in each row."""
        return np.diff(self.starts)

    def row(self, number: int) -> Integer[np.ndarray, " T"]:
        """The ids of one row."""
        return self.ids[self.starts[number] : self.starts[number + 1]]

    def row_types(self, number: int) -> Integer[np.ndarray, " T"]:
        """The token types of one row."""
        return self.types[self.starts[number] : self.starts[number + 1]]


class RowWriter:
    """Tokenizes texts with the tokenizer's special tokens, cut to `limit` tokens.

    Args:
      end: put after every row (the limit includes it).
      vocabulary: the model's.

    Raises ValueError for a limit without room for text; adding texts does for ids that the model does not have.
    """

    def __init__(self, assets: Assets, limit: int, *, end: Sequence[int] = (), vocabulary: int | None = None):
        self._tokenizer = make_tokenizer(assets.files, max(limit, 1))
        room = limit - len(end)
        if room <= self._tokenizer.num_special_tokens_to_add(False):
            raise ValueError(f"training data: a length of {limit} leaves no room beside the special tokens")
        self._tokenizer.enable_truncation(room)
        self._limit, self._end, self._vocabulary = limit, list(end), vocabulary
        self._ids, self._types, self._starts, self._cut = array("i"), array("b"), array("q", [0]), 0

    def add(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> None:
        """Adds texts, or pairs of texts."""
        for encoding in self._tokenizer.encode_batch(list(texts)):
            ids = [*encoding.ids, *self._end]
            check_vocabulary(max(ids, default=0), self._vocabulary)
            self._ids.extend(ids)
            self._types.extend([*encoding.type_ids, *(0 for _ in self._end)])
            self._starts.append(len(self._ids))
            self._cut += bool(encoding.overflowing)

    def done(self) -> Rows:
        """All rows; a warning says how many texts were cut."""
        count = len(self._starts) - 1
        if self._cut:
            log.warning("%d of %d texts were longer than %d tokens and were cut", self._cut, count, self._limit)
        ids, types, starts = self._ids, self._types, self._starts
        return Rows(np.frombuffer(ids, np.int32), np.frombuffer(types, np.int8), np.frombuffer(starts, np.int64))


def chunked(items: Iterable[Any]) -> Iterator[list[Any]]:
    """As many items at a time as are tokenized together."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, _CHUNK)):
        yield chunk
