"""Batches for the classification of tokens: a tag for each word."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Unpack

import numpy as np

from flaxcompress.data.batches import IGNORED, Batch, BatchOptions, PlannedBatches, Row, planned_batches
from flaxcompress.data.buckets import find_buckets, make_buckets
from flaxcompress.data.conll import Tagged
from flaxcompress.data.frame import padding_id
from flaxcompress.data.words import Part, tagged_parts
from flaxcompress.text import Assets, pad_ids


def tagging_batches(
    source: Tagged,
    assets: Assets,
    *,
    names: Sequence[str],
    length: int,
    batch_size: int,
    seed: int = 0,
    buckets: int | Sequence[int] = 4,
    vocabulary: int | None = None,
    classes: int | None = None,
    pad: int | None = None,
    **options: Unpack[BatchOptions],
) -> PlannedBatches:
    """Batches for the classification of tokens: input_ids, attention_mask, and labels [B, T].

    A word's first token has its tag's number; all other tokens have -100, and do not count.

    Args:
      source: sentences (see `read_conll`); longer ones than `length` tokens make several rows.
      names: the tags in the order of the classes.
      length: tokens of a row at most.
      batch_size: rows of the global batch.
      buckets: the padded lengths, or their number.
      vocabulary, classes: the model's, to check tokenizer and tags against.
      pad: the id for padding; by default the tokenizer's.

    Raises ValueError for tags that are not among the names, more of them than the model has classes, and ids beyond the
    vocabulary.
    """
    if classes is not None and len(names) > classes:
        raise ValueError(
            f"tagging_batches: the data have {len(names)} tags ({', '.join(names)}), the model has {classes} classes"
        )
    numbers = {name: number for number, name in enumerate(names)}
    if unknown := {tag for tags in source.tags for tag in tags}.difference(numbers):
        raise ValueError(f"tagging_batches: tags {', '.join(sorted(unknown))} are not among {', '.join(names)}")
    parts = [part for part in tagged_parts(assets, source.words, length=length, vocabulary=vocabulary) if part.places]
    if not parts:
        raise ValueError("tagging_batches: no sentence has a token")
    labels = [[numbers[tag] for tag in tags] for tags in source.tags]
    lengths = make_buckets(length, buckets)
    make = _Make(parts, labels, lengths, padding_id(assets, pad))
    sizes = np.array([len(part.ids) for part in parts])
    return planned_batches(find_buckets(sizes, lengths), make, batch_size=batch_size, seed=seed, **options)


@dataclasses.dataclass(frozen=True)
class _Make:
    """Rows -> batch; see `Make`."""

    parts: Sequence[Part]
    labels: Sequence[Sequence[int]]
    lengths: Sequence[int]
    pad: int

    def __call__(self, rows: list[Row], bucket: int) -> Batch:
        chosen, length = (
            [None if row.example is None else self.parts[row.example] for row in rows],
            self.lengths[bucket],
        )
        ids, mask = pad_ids([[] if part is None else part.ids for part in chosen], length, len(rows), self.pad)
        labels = np.full((len(rows), length), IGNORED, np.int32)
        for row, part in enumerate(chosen):
            if part is not None:
                for word, place in part.places.items():
                    labels[row, place] = self.labels[part.sentence][word]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
