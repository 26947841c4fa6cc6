"""Embeddings from outside, for terms of a lexicon."""

from __future__ import annotations

import dataclasses

from flaxcompress.config.part import Part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lexicon(Part):
    """A table of `entries` vectors of width `width`, added through a gate to the tokens of a lexicon's terms.

    A token's feature id is 0 where it belongs to no term, else the number of the term's vector, from 1.
    """

    entries: int
    width: int

    def __post_init__(self):
        for name in ("entries", "width"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"lexicon: {name} must be a positive integer, got {value!r}")
