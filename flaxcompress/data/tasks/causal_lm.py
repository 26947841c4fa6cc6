"""Batches for causal language modelling."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Unpack

import numpy as np

from flaxcompress.data.batches import IGNORED, Batch, BatchOptions, PlannedBatches, Row, planned_batches
from flaxcompress.data.buckets import find_buckets, make_buckets
from flaxcompress.data.chunks import Chunks, cut_documents
from flaxcompress.data.documents import Corpus, Source, as_corpus
from flaxcompress.data.frame import find_frame, padding_id, special_id
from flaxcompress.data.packing import Packing
from flaxcompress.data.token_cache import corpus_tokens
from flaxcompress.text import Assets


def causal_lm_batches(
    source: Corpus | Source,
    assets: Assets,
    *,
    length: int,
    batch_size: int,
    seed: int = 0,
    pack: bool = True,
    buckets: int | Sequence[int] = 4,
    vocabulary: int | None = None,
    pad: int | None = None,
    **options: Unpack[BatchOptions],
) -> PlannedBatches:
    """Batches for predicting the next token: input_ids, labels, and packs or attention_mask.

    Documents are put between the tokens that begin and end a text, as far as the tokenizer has such, and cut into
    stretches of up to `length` inputs; each token but a document's first is a label once per epoch.

    Args:
      source: texts, files, or a `Corpus`, which says how files are read.
      batch_size: rows of the global batch.
      pack: several stretches share a row, numbered in `packs`; else batches are padded to one of the `buckets`, which
        is their number or the lengths themselves.
      vocabulary: the model's, to check the tokenizer against.
      pad: the id for padding; by default the tokenizer's.

    Raises ValueError and FileNotFoundError as `Corpus.documents` does, and ValueError for ids beyond the vocabulary.
    """
    if length < 1:
        raise ValueError(f"causal_lm_batches: length must be at least 1, got {length}")
    frame = find_frame(assets)
    end = assets.end_tokens[:1] or [i for i in [special_id(assets, "eos")] if i is not None]
    tokens = corpus_tokens(
        as_corpus(source), assets, before=frame.before, after=frame.after or tuple(end), vocabulary=vocabulary
    )
    chunks = cut_documents(tokens.document_places, length + 1, overlap=1)
    pad = padding_id(assets, pad)
    inputs = chunks.lengths - 1
    if not len(inputs):
        raise ValueError("causal_lm_batches: every document is a single token: there is none to predict")
    if pack:
        make = _Make(tokens.ids, chunks, pad, (length,), packed=True)
        return planned_batches(Packing(inputs, length), make, batch_size=batch_size, seed=seed, **options)
    lengths = make_buckets(length, buckets)
    make = _Make(tokens.ids, chunks, pad, lengths, packed=False)
    return planned_batches(find_buckets(inputs, lengths), make, batch_size=batch_size, seed=seed, **options)


@dataclasses.dataclass(frozen=True)
class _Make:
    """Rows -> batch; see `Make`."""

    ids: np.ndarray
    chunks: Chunks
    pad: int
    lengths: Sequence[int]
    packed: bool

    def __call__(self, rows: list[Row], bucket: int) -> Batch:
        shape = (len(rows), self.lengths[bucket])
        ids, labels = np.full(shape, self.pad, np.int32), np.full(shape, IGNORED, np.int32)
        packs = np.zeros(shape, np.int32)
        for i, row in enumerate(rows):
            place = 0
            for number, example in enumerate(row.examples, 1):
                chunk = self.ids[self.chunks.starts[example] : self.chunks.stops[example]]
                stop = place + len(chunk) - 1
                ids[i, place:stop], labels[i, place:stop] = chunk[:-1], chunk[1:]
                packs[i, place:stop] = number
                place = stop
        batch = {"input_ids": ids, "labels": labels}
        return batch | ({"packs": packs} if self.packed else {"attention_mask": packs > 0})
