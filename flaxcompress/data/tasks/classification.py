"""Batches for the classification of texts, or of pairs of texts, and for regression."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import numpy as np

from flaxcompress.data.batches import IGNORED, Batch, BatchOptions, PlannedBatches, Row, planned_batches
from flaxcompress.data.buckets import find_buckets, make_buckets
from flaxcompress.data.frame import padding_id
from flaxcompress.data.labelled import Labelled, read_labelled
from flaxcompress.data.rows import Rows, RowWriter, chunked
from flaxcompress.text import Assets, pad_ids


def classification_batches(
    source: Labelled | str | Path | Sequence[str | Path],
    assets: Assets,
    *,
    length: int,
    batch_size: int,
    seed: int = 0,
    buckets: int | Sequence[int] = 4,
    vocabulary: int | None = None,
    classes: int | None = None,
    pad: int | None = None,
    **options: Unpack[BatchOptions],
) -> PlannedBatches:
    """Batches for classification: input_ids, segment_ids, attention_mask, and labels [B], float32 for regression.

    A row that only fills up a batch has the label -100.

    Args:
      source: what `read_labelled` returns, or files that it reads with its defaults.
      length: tokens of a text at most, longer ones are cut.
      batch_size: rows of the global batch.
      buckets: the padded lengths, or their number.
      vocabulary, classes: the model's, to check tokenizer and labels against.
      pad: the id for padding; by default the tokenizer's.

    Raises ValueError and FileNotFoundError as `read_labelled` does, and ValueError for ids beyond the vocabulary and
    for labels beyond the classes.
    """
    found = source if isinstance(source, Labelled) else read_labelled(source)
    if len(found.texts) != len(found.labels):
        raise ValueError(f"classification_batches: {len(found.texts)} texts, but {len(found.labels)} labels")
    whole = np.issubdtype(found.labels.dtype, np.integer)
    labels = found.labels.astype(np.int32 if whole else np.float32)
    lowest, highest = labels.min(initial=0), labels.max(initial=0)
    if whole and (lowest < 0 or (classes is not None and highest >= classes)):
        raise ValueError(
            f"classification_batches: labels are {lowest} to {highest} ({', '.join(found.names)}), but the model has "
            f"classes 0 to {(classes or highest + 1) - 1}"
        )
    writer = RowWriter(assets, length, vocabulary=vocabulary)
    for chunk in chunked(found.texts):
        writer.add(chunk)
    rows, lengths = writer.done(), make_buckets(length, buckets)
    make = _Make(rows, labels, lengths, padding_id(assets, pad))
    return planned_batches(find_buckets(rows.lengths, lengths), make, batch_size=batch_size, seed=seed, **options)


@dataclasses.dataclass(frozen=True)
class _Make:
    """Rows -> batch; see `Make`."""

    rows: Rows
    labels: np.ndarray
    lengths: Sequence[int]
    pad: int

    def __call__(self, rows: list[Row], bucket: int) -> Batch:
        examples, length = [row.example for row in rows], self.lengths[bucket]
        contents = [[] if i is None else self.rows.row(i) for i in examples]
        types = [[] if i is None else self.rows.row_types(i) for i in examples]
        ids, mask = pad_ids(contents, length, len(rows), self.pad)  # pyright: ignore[reportArgumentType]
        segments, _ = pad_ids(types, length, len(rows), 0)  # pyright: ignore[reportArgumentType]
        labels = np.array([IGNORED if i is None else self.labels[i] for i in examples], self.labels.dtype)
        return {"input_ids": ids, "attention_mask": mask, "segment_ids": segments, "labels": labels}
