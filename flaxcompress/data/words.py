"""Sentences of words as rows of tokens, and which token stands for each word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flaxcompress.data.frame import check_vocabulary, find_frame, whole_tokenizer
from flaxcompress.text import Assets


class Part(NamedTuple):
    """A row of tokens, or a part of one, with the special tokens around it.

    Attributes:
      ids: of the tokens.
      sentence: its number.
      places: {number of a word in the sentence: the place of its first token in the row}.
    """

    ids: list[int]
    sentence: int
    places: dict[int, int]


def tagged_parts(
    assets: Assets, sentences: Sequence[Sequence[str]], *, length: int, vocabulary: int | None = None
) -> Iterator[Part]:
    """Sentences as rows of at most `length` tokens: their words with blanks between; cut where a word begins.

    Raises ValueError for a length that leaves no room, and ids beyond the vocabulary.
    """
    frame, tokenizer = find_frame(assets), whole_tokenizer(assets)
    room = length - frame.single_size
    if room < 1:
        raise ValueError(f"tokens: {length} tokens leave no room beside the special ones")
    texts = [" ".join(words) for words in sentences]
    for number, found in enumerate(tokenizer.encode_batch(texts, add_special_tokens=False)):
        ids, firsts = list(found.ids), first_tokens(sentences[number], found.offsets)
        check_vocabulary(max(ids, default=0), vocabulary)
        borders = sorted({*firsts.values(), len(ids)})
        start = 0
        while start < len(ids):
            stop = max((place for place in borders if start < place <= start + room), default=start + room)
            places = {w: p - start + len(frame.before) for w, p in firsts.items() if start <= p < stop}
            yield Part([*frame.before, *ids[start:stop], *frame.after], number, places)
            start = stop


def first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> dict[int, int]:
    """{number of a word: the first token that holds its first character}; words without tokens are left out."""
    out, begin, token = {}, 0, 0
    for number, word in enumerate(words):
        while token < len(offsets) and offsets[token][1] <= begin:
            token += 1
        end = begin + len(word)
        if token < len(offsets) and offsets[token][0] < end:
            out[number] = token
        begin = end + 1
    return out
