"""Terms of a lexicon, found in token sequences."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence

from flaxcompress.text import LEXICON, Assets
from flaxcompress.tokenizer import make_tokenizer

_WORD_STARTS = ("▁", "Ġ")  # by which tokenizers of text with blanks mark a word's first token


class Terms:
    """Finds the terms of a lexicon in token ids: the longest one at every place, whole words only.

    Args:
      numbers: {term: feature id, from 1}.
      assets: whose tokenizer cuts the terms, and the texts.
    """

    def __init__(self, numbers: Mapping[str, int], assets: Assets):
        tokenizer = make_tokenizer(assets.files, 1 << 30)
        self._names = {number: token for token, number in tokenizer.get_vocab().items()}
        self._special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._marked = next((m for m in _WORD_STARTS if any(t.startswith(m) for t in self._names.values())), None)
        self._by_first: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        for term, number in numbers.items():
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"lexicon: {term!r} has the number {number!r}; numbers count from 1")
            for spelling in {term, f" {term}"}:  # within a text a word may be cut otherwise than at its start
                ids = tuple(tokenizer.encode(spelling, add_special_tokens=False).ids)
                if not term.strip() or not ids:
                    raise ValueError(f"lexicon: the term {term!r} is blank to the tokenizer")
                self._by_first.setdefault(ids[0], []).append((ids, number))
        for entries in self._by_first.values():
            entries.sort(key=lambda entry: -len(entry[0]))

    def find(self, ids: Sequence[int]) -> list[int]:
        """The feature id of every token, 0 where it belongs to no term."""
        out, place = [0] * len(ids), 0
        while place < len(ids):
            found = self._at(ids, place)
            if found is None:
                place += 1
                continue
            length, number = found
            out[place : place + length] = [number] * length
            place += length
        return out

    def _at(self, ids: Sequence[int], place: int) -> tuple[int, int] | None:
        first = place == 0 or ids[place - 1] in self._special
        if not first and self._continues(ids[place]):
            return None
        for term, number in self._by_first.get(ids[place], ()):
            end = place + len(term)
            if tuple(ids[place:end]) == term and (end == len(ids) or not self._continues(ids[end])):
                return len(term), number
        return None

    def _continues(self, token: int) -> bool:
        """Whether a token belongs to the same word as the one before."""
        name = self._names.get(token, "")
        if token in self._special:
            return False
        if self._marked is None:
            return name.startswith("##")
        return not name.startswith(self._marked) and name[:1].isalnum()


@functools.lru_cache(maxsize=8)
def read_terms(assets: Assets) -> Terms | None:
    """The terms in the assets' lexicon.json; None where there is none. Raises ValueError for a damaged one."""
    content = assets.file(LEXICON)
    if content is None:
        return None
    try:
        numbers = json.loads(content)["terms"]
        return Terms(dict(numbers), assets)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{LEXICON}: expected an object with 'terms', {{term: number}} ({error})") from None
