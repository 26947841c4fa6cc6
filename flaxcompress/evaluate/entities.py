"""Entities from the tags of words, and how well they were found: an entity counts where its span and kind are right."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

OUTSIDE = "O"


class Entity(NamedTuple):
    """Words `start` up to but not including `stop`."""

    kind: str
    start: int
    stop: int


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence whose words are tagged O, B-kind (its first word) or I-kind (a later one).

    An I- that no word of the same kind stands before begins an entity, as in CoNLL's own scoring (Tjong Kim Sang & De
    Meulder 2003). Raises ValueError for other tags.
    """
    found: list[Entity] = []
    open_kind, start = None, 0
    for place, tag in enumerate([*tags, OUTSIDE]):
        mark, _, kind = tag.partition("-")
        if tag != OUTSIDE and (mark not in ("B", "I") or not kind):
            raise ValueError(f"entities: tags must be O, B-… or I-…, got {tag!r}")
        if mark == "I" and kind == open_kind:
            continue
        if open_kind is not None:
            found.append(Entity(open_kind, start, place))
        open_kind, start = kind or None, place
    return found


def entity_scores(labels: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, Any]:
    """entities, precision, recall and f1 of all sentences together, and f1_by_kind, from the tags of their words."""
    counts = {name: collections.Counter() for name in ("labelled", "found", "right")}
    for one, two in zip(labels, found, strict=True):
        wanted, got = set(entities(one)), set(entities(two))
        for name, spans in (("labelled", wanted), ("found", got), ("right", wanted & got)):
            counts[name].update(span.kind for span in spans)
    labelled, given, right = (counts[name].total() for name in ("labelled", "found", "right"))
    return {
        "entities": labelled,
        "precision": right / given if given else 0.0,
        "recall": right / labelled if labelled else 0.0,
        "f1": _f1(labelled, given, right),
        "f1_by_kind": {
            kind: _f1(*(counts[name][kind] for name in ("labelled", "found", "right")))
            for kind in sorted({*counts["labelled"], *counts["found"]})
        },
    }


def _f1(labelled: int, found: int, right: int) -> float:
    return 2 * right / (labelled + found) if labelled + found else 0.0
