"""Chunks: stretches of documents that fit into a row."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from flaxcompress.data.tokens import Tokens


class Chunks(NamedTuple):
    """Stretches of the flat tokens, each within one document.

    Attributes:
      starts: the first token.
      stops: the one after the last.
    """

    starts: Int[np.ndarray, " n"]
    stops: Int[np.ndarray, " n"]

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        """Tokens in each."""
        return self.stops - self.starts


def cut_documents(places: Int[np.ndarray, " D+1"], limit: int, *, overlap: int = 0, least: int = 1) -> Chunks:
    """Cuts documents, each from places[i] to places[i + 1], into chunks of `limit` tokens and a rest.

    Args:
      overlap: so many tokens at a chunk's end are also the first of the next (1 for language models, in which every
        token but a document's last is an input once, and every one but its first a target).
      least: a shorter rest gets tokens of the chunk before it (where that is long enough); shorter ones are left out.
    """
    if limit <= overlap:
        raise ValueError(f"chunks: a limit above {overlap} is needed, got {limit}")
    begins, ends = places[:-1], places[1:]
    step = limit - overlap
    counts = np.maximum(-(-(ends - begins - overlap) // step), 0)  # a document of `overlap` tokens or fewer has none
    total = int(counts.sum())
    number = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)  # of a chunk in its document
    starts = np.repeat(begins, counts) + number * step
    stops = np.minimum(starts + limit, np.repeat(ends, counts))
    short = np.flatnonzero((stops - starts < least) & (number > 0) & (limit >= 2 * least))
    missing = least - (stops - starts)[short]
    starts[short] -= missing
    stops[short - 1] -= missing
    kept = stops - starts >= max(least, overlap + 1)
    return Chunks(starts[kept], stops[kept])


def join_units(tokens: Tokens, limit: int) -> Chunks:
    """Joins a document's units while they fit into `limit` tokens; a longer unit is cut into chunks of its own."""
    if limit < 1:
        raise ValueError(f"chunks: a limit of at least 1 token is needed, got {limit}")
    starts: list[int] = []
    stops: list[int] = []
    units = tokens.units
    for first, last in zip(tokens.documents[:-1].tolist(), tokens.documents[1:].tolist(), strict=True):
        places = units[first : last + 1].tolist()
        begin = places[0]
        for place, following in itertools.pairwise(places):
            if following - begin > limit and place > begin:
                starts.append(begin)
                stops.append(place)
                begin = place
            while following - begin > limit:
                starts.append(begin)
                stops.append(begin + limit)
                begin += limit
        if places[-1] > begin:
            starts.append(begin)
            stops.append(places[-1])
    return Chunks(np.array(starts, np.int64), np.array(stops, np.int64))
