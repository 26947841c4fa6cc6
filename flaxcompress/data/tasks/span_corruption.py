"""Batches for span corruption, T5's pretraining."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Unpack

import numpy as np

from flaxcompress.data.batches import Batch, BatchOptions, PlannedBatches, Row, planned_batches
from flaxcompress.data.buckets import find_buckets, make_buckets
from flaxcompress.data.chunks import Chunks, cut_documents
from flaxcompress.data.documents import Corpus, Source, as_corpus
from flaxcompress.data.frame import check_vocabulary, need_special_id, padding_id, sentinel_ids, start_id
from flaxcompress.data.seq2seq import seq2seq_batch
from flaxcompress.data.span_corruption import corrupt, longest_stretch, noise_mask, span_counts
from flaxcompress.data.token_cache import corpus_tokens
from flaxcompress.text import Assets


def span_corruption_batches(
    source: Corpus | Source,
    assets: Assets,
    *,
    length: int,
    batch_size: int,
    seed: int = 0,
    density: float = 0.15,
    mean_span: float = 3.0,
    buckets: int | Sequence[int] = 4,
    vocabulary: int | None = None,
    pad: int | None = None,
    **options: Unpack[BatchOptions],
) -> PlannedBatches:
    """Batches for span corruption: input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, labels.

    Documents are cut into stretches whose inputs fit `length`; a stretch is corrupted anew in every epoch, as the seed,
    its number and the epoch say. Documents of a single token are left out.

    Args:
      source: texts, files, or a `Corpus`, which says how files are read.
      length: tokens of an input; targets have as many as follow from that (see `span_counts`).
      batch_size: rows of the global batch.
      density: the share of tokens taken out.
      mean_span: the mean length of the runs.
      buckets: the padded lengths of inputs, or their number.
      vocabulary: the model's, to check the tokenizer against.
      pad: the id for padding; by default the tokenizer's.

    Raises ValueError and FileNotFoundError as `Corpus.documents` does, and ValueError for a tokenizer with too few
    sentinels or without an end token, and for ids beyond the vocabulary.
    """
    if not 0 < density < 1 or mean_span < 1:
        raise ValueError(
            f"span corruption: density must lie between 0 and 1, mean_span be 1 or more, got {density} and {mean_span}"
        )
    corruption = {"density": density, "mean_span": mean_span}
    longest = longest_stretch(length, **corruption)
    sentinels, end = sentinel_ids(assets), need_special_id(assets, "eos", "span corruption")
    if (spans := span_counts(longest, **corruption).spans) > len(sentinels):
        raise ValueError(
            f"span corruption: length {length} needs {spans} sentinels, the tokenizer has {len(sentinels)}"
        )
    check_vocabulary(max(sentinels), vocabulary)
    tokens = corpus_tokens(as_corpus(source), assets, vocabulary=vocabulary)
    chunks = cut_documents(tokens.document_places, longest, least=2)
    if not len(chunks.starts):
        raise ValueError("span_corruption_batches: every document is a single token: none can be taken out")
    sizes, which = np.unique(chunks.lengths, return_inverse=True)
    inputs = np.array([span_counts(n, **corruption).inputs for n in sizes.tolist()])[which]
    lengths = make_buckets(length, buckets)
    limits = [longest_stretch(max(n, 3), **corruption) for n in lengths]
    make = _Make(
        ids=tokens.ids,
        chunks=chunks,
        corruption=corruption,
        sentinels=sentinels,
        end=end,
        start=start_id(assets, padding_id(assets, pad)),
        pad=padding_id(assets, pad),
        lengths=tuple((n, span_counts(limit, **corruption).targets) for n, limit in zip(lengths, limits, strict=True)),
    )
    return planned_batches(find_buckets(inputs, lengths), make, batch_size=batch_size, seed=seed, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Make:
    """Rows -> batch; see `Make`."""

    ids: np.ndarray
    chunks: Chunks
    corruption: dict[str, float]
    sentinels: Sequence[int]
    end: int
    start: int
    pad: int
    lengths: Sequence[tuple[int, int]]  # of inputs and targets, by bucket

    def __call__(self, rows: list[Row], bucket: int) -> Batch:
        corrupted = [self._corrupted(row) for row in rows]
        inputs, targets = zip(*corrupted, strict=True)
        return seq2seq_batch(inputs, targets, self.lengths[bucket], start=self.start, pad=self.pad)

    def _corrupted(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        if (example := row.example) is None:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        chunk, rng = self.ids[self.chunks.starts[example] : self.chunks.stops[example]], row.rng(example)
        noise = noise_mask(len(chunk), span_counts(len(chunk), **self.corruption), rng)
        return corrupt(chunk, noise, self.sentinels, self.end)
