"""The task "tokens": entities found by a classifier of tokens."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxcompress.data.conll import Tagged, read_conll
from flaxcompress.data.words import tagged_parts
from flaxcompress.evaluate.classes import agreement
from flaxcompress.evaluate.entities import OUTSIDE, entities, entity_scores
from flaxcompress.evaluate.tasks.labels import class_names, class_numbers
from flaxcompress.evaluate.tasks.rows import logits_of
from flaxcompress.evaluate.tasks.task import Result, beside, data_name, last_of, need_data, need_head
from flaxcompress.model import Model

log = logging.getLogger("flaxcompress")

_TASK = "tokens"


def tokens(
    model: Model,
    *,
    data: Any = None,
    reference: Model | None = None,
    progress: bool = False,
    labels: Sequence[str] = (),
    hold_out: int = 0,
    batch_size: int = 32,
) -> Result:
    """data, n (sentences), words, accuracy of tags, precision, recall, f1, f1_by_kind; with a reference, agreement.

    A word has the tag of its first token. An entity is right where its first word, its last word and its kind are.
    Sentences longer than the model's limit are read in parts, so that every word has a tag.

    Args:
      data: a file with a word and its tag (O, B-kind or I-kind) per line, blank lines between sentences; or `Tagged`.
      labels: the names of the model's tags, in order, where its folder does not say them.
      hold_out: only the last so many sentences.

    Raises ValueError for another head, for tags that the model does not know, and for lines without a tag.
    """
    models = [model] if reference is None else [model, reference]
    for one, who in zip(models, ("the model", "the reference"), strict=False):
        need_head(one, _TASK, "token_classification", who=who)
    need_data(data, _TASK, "a file with a word and its tag (O, B-… or I-…) per line, blank lines between sentences")
    found = data if isinstance(data, Tagged) else read_conll(_path(data))
    rows = last_of(range(len(found.words)), hold_out, _TASK)
    words, tags = ([side[i] for i in rows] for side in found)
    for row in tags:
        entities(row)  # raises for tags of another scheme
    names = tuple(sorted({tag for row in tags for tag in row}))
    chosen = [_tags(one, words, names, labels, batch_size=batch_size, progress=progress) for one in models]
    head: Result = {"data": data_name(data, "given sentences"), "n": len(words), "words": sum(map(len, words))}
    scores = [{"accuracy": _same(tags, each), **entity_scores(tags, each)} for each in chosen]
    if len(scores) == 1:
        return head | scores[0]
    return head | beside(scores[0], scores[1]) | {"agreement": _same(*chosen)}


def _path(data: Any) -> str | Path:
    if not isinstance(data, (str, Path)):
        raise ValueError(f"{_TASK}: a single file is needed, or Tagged words; got {type(data).__name__}")
    return data


def _same(a: Sequence[Sequence[str]], b: Sequence[Sequence[str]]) -> float:
    flat = (np.array(list(itertools.chain.from_iterable(side))) for side in (a, b))
    return agreement(*flat)


def _tags(
    model: Model,
    words: Sequence[Sequence[str]],
    names: tuple[str, ...],
    labels: Sequence[str],
    *,
    batch_size: int,
    progress: bool,
) -> list[list[str]]:
    """The tag of every word, in the data's spelling; O where a word has no token."""
    numbers = class_numbers(model, _TASK, names, labels)
    own = class_names(model, _TASK, labels) or tuple(str(i) for i in range(model.config.classes))
    spelled = [*own]
    for name, number in zip(names, numbers, strict=True):
        spelled[number] = name
    out = [[OUTSIDE] * len(row) for row in words]
    parts = list(tagged_parts(model.assets, words, length=model.assets.max_length, vocabulary=model.config.vocabulary))
    if len(parts) > len({part.sentence for part in parts}):
        log.warning("sentences of over %d tokens were read in parts", model.assets.max_length)
    rows = [part.ids for part in parts]
    for chosen, logits in logits_of(model, rows, None, _TASK, batch_size=batch_size, progress=progress):
        for number, best in zip(chosen, logits.argmax(-1), strict=True):
            part = parts[number]
            for word, place in part.places.items():
                out[part.sentence][word] = spelled[best[place]]
    return out
