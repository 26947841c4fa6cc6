"""Batches for translation, and any other task from text to text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Unpack

import numpy as np

from flaxcompress.data.batches import Batch, BatchOptions, PlannedBatches, Row, planned_batches
from flaxcompress.data.buckets import find_buckets, make_buckets
from flaxcompress.data.documents import Source
from flaxcompress.data.frame import find_frame, need_special_id, padding_id, start_id
from flaxcompress.data.parallel import read_parallel
from flaxcompress.data.portion import Portion
from flaxcompress.data.rows import Rows, RowWriter, chunked
from flaxcompress.data.seq2seq import seq2seq_batch
from flaxcompress.text import Assets


def translation_batches(
    source_texts: Source,
    target_texts: Source,
    assets: Assets,
    *,
    length: int,
    batch_size: int,
    seed: int = 0,
    target_assets: Assets | None = None,
    target_length: int | None = None,
    buckets: int | Sequence[int] = 4,
    max_bad_lines: int = 100,
    portion: Portion = Portion(),  # noqa: B008  (a tuple, never changed)
    vocabulary: int | None = None,
    pad: int | None = None,
    **options: Unpack[BatchOptions],
) -> PlannedBatches:
    """Batches for translation: input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, labels.

    Texts have the tokenizer's special tokens; targets end with its end token. Texts of similar lengths share a batch.

    Args:
      source_texts, target_texts: as `read_parallel` reads them.
      length: tokens of an input at most, longer ones are cut; `target_length` of a target, by default as many.
      batch_size: rows of the global batch.
      target_assets: the targets' tokenizer, where it is another one.
      buckets: the padded lengths of inputs, or their number; targets have as many, in the same proportion. A pair goes
        to the first into which both fit.
      max_bad_lines: so many lines that cannot be read are skipped, together with their translation.
      portion: which of the pairs.
      vocabulary: the model's, to check the tokenizer against.
      pad: the id for padding; by default the tokenizer's.

    Raises ValueError and FileNotFoundError as `read_parallel` does, and ValueError for ids beyond the vocabulary and
    for targets without an end token.
    """
    target_assets, target_length = target_assets or assets, target_length or length
    end = () if find_frame(target_assets).after else (need_special_id(target_assets, "eos", "translation"),)
    pairs = portion.of(read_parallel(source_texts, target_texts, max_bad_lines=max_bad_lines))
    inputs = RowWriter(assets, length, vocabulary=vocabulary)
    targets = RowWriter(target_assets, target_length, end=end, vocabulary=vocabulary)
    for chunk in chunked(pairs):
        inputs.add([one for one, _ in chunk])
        targets.add([two for _, two in chunk])
    ones, twos = inputs.done(), targets.done()
    lengths = make_buckets(length, buckets)
    shapes = tuple((n, -(-target_length * n // length)) for n in lengths)
    found = np.maximum(find_buckets(ones.lengths, lengths), find_buckets(twos.lengths, [n for _, n in shapes]))
    pad = padding_id(assets, pad)
    make = _Make(ones, twos, shapes, start_id(assets, pad), pad)
    return planned_batches(found, make, batch_size=batch_size, seed=seed, **options)


@dataclasses.dataclass(frozen=True)
class _Make:
    """Rows -> batch; see `Make`."""

    inputs: Rows
    targets: Rows
    shapes: Sequence[tuple[int, int]]
    start: int
    pad: int

    def __call__(self, rows: list[Row], bucket: int) -> Batch:
        inputs, targets = (
            [[] if row.example is None else side.row(row.example) for row in rows]
            for side in (self.inputs, self.targets)
        )
        return seq2seq_batch(inputs, targets, self.shapes[bucket], start=self.start, pad=self.pad)
