"""Batches for masked language modelling, with or without sentence order."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple, Unpack

import numpy as np

from flaxcompress.data.batches import IGNORED, Batch, BatchOptions, PlannedBatches, Row, planned_batches
from flaxcompress.data.buckets import find_buckets, make_buckets
from flaxcompress.data.chunks import Chunks, join_units
from flaxcompress.data.documents import Corpus, Source, as_corpus
from flaxcompress.data.frame import (
    Frame,
    check_vocabulary,
    find_frame,
    need_special_id,
    padding_id,
    special_ids,
    whole_tokenizer,
)
from flaxcompress.data.masking import mask_row, masked_count, ngram_shares
from flaxcompress.data.packing import Packing
from flaxcompress.data.sentence_order import NO_PAIR, inner_borders, split_pair
from flaxcompress.data.sentences import split_sentences
from flaxcompress.data.token_cache import corpus_tokens
from flaxcompress.data.tokens import Tokens
from flaxcompress.text import Assets

_BLANK_LINES = re.compile(r"\n(?:[ \t\r\f\v]*\n)+")


def masked_lm_batches(
    source: Corpus | Source,
    assets: Assets,
    *,
    length: int,
    batch_size: int,
    seed: int = 0,
    mask_rate: float = 0.15,
    ngram: int = 3,
    whole_word: bool = True,
    sentence_order: bool = False,
    pack: bool = False,
    buckets: int | Sequence[int] = 4,
    vocabulary: int | None = None,
    pad: int | None = None,
    **options: Unpack[BatchOptions],
) -> PlannedBatches:
    """Batches for masked language modelling: input_ids, segment_ids, label_positions, labels, attention_mask or packs.

    Documents are cut at sentences into stretches that fit `length`; a stretch is masked anew in every epoch, as the
    seed, its number and the epoch say (ALBERT, Lan et al. 2020).

    Args:
      source: texts, files, or a `Corpus`, which says how files are read.
      batch_size: rows of the global batch.
      mask_rate: the share of a stretch's tokens that is hidden.
      ngram: up to so many words are hidden together; n with a likelihood in proportion to 1/n.
      whole_word: words are hidden as a whole, as the tokenizer cuts words.
      sentence_order: stretches of two sentences or more become two segments, swapped half of the time: `order_labels`.
      pack: several stretches share a row, numbered in `packs`; else batches are padded to one of the `buckets`, which
        is their number or the lengths themselves.
      vocabulary: the model's, to check the tokenizer against, and to draw random tokens from those it knows.
      pad: the id for padding; by default the tokenizer's.

    Raises ValueError and FileNotFoundError as `Corpus.documents` does, and ValueError for a tokenizer without a mask,
    ids beyond the vocabulary, and for sentence order where no document has two sentences.
    """
    if pack and sentence_order:
        raise ValueError("masked_lm_batches: a packed row has no single sentence order: use pack or sentence_order")
    if not 0 < mask_rate < 1:
        raise ValueError(f"masked_lm_batches: mask_rate must lie between 0 and 1, got {mask_rate}")
    ngram_shares(ngram)
    mask = need_special_id(assets, "mask", "masked language modelling")
    frame = find_frame(assets)
    check_vocabulary(max(mask, *frame.before, *frame.after, *frame.first, *frame.middle, *frame.last), vocabulary)
    specials = frame.pair_size if sentence_order else frame.single_size
    if length <= specials:
        raise ValueError(f"masked_lm_batches: length {length} leaves no room beside {specials} special tokens")
    tokens = corpus_tokens(as_corpus(source), assets, _sentence_units, words=whole_word, vocabulary=vocabulary)
    chunks = join_units(tokens, length - specials)
    inner = inner_borders(tokens, chunks)
    is_pair = (inner[1] > inner[0]) & sentence_order
    if sentence_order and not is_pair.any():
        raise ValueError(
            "masked_lm_batches: sentence order needs two sentences in a row, but no document has two that fit into "
            f"{length} tokens; give longer documents (Corpus.separator), or sentence_order=False"
        )
    lengths = chunks.lengths + np.where(is_pair, frame.pair_size, frame.single_size)
    known = min(whole_tokenizer(assets).get_vocab_size(with_added_tokens=True), vocabulary or sys.maxsize)
    padded = (length,) if pack else make_buckets(length, buckets)
    make = _Make(
        tokens=tokens,
        chunks=chunks,
        pairs=is_pair,
        borders=inner,
        frame=frame,
        mask=mask,
        pad=padding_id(assets, pad),
        replacements=np.setdiff1d(np.arange(known), list(special_ids(assets))),
        rate=mask_rate,
        ngram=ngram,
        sentence_order=sentence_order,
        packed=pack,
        lengths=padded,
        most=tuple(masked_count(n - frame.single_size, mask_rate) for n in padded),
    )
    if not pack:
        return planned_batches(find_buckets(lengths, padded), make, batch_size=batch_size, seed=seed, **options)
    packing = Packing(lengths, length)
    examples, starts = packing.bins(None)  # rows of every epoch have these lengths
    hidden = np.array([masked_count(n, mask_rate) for n in chunks.lengths.tolist()])[examples]
    make = dataclasses.replace(make, most=(int(np.add.reduceat(hidden, starts[:-1]).max()),))
    return planned_batches(packing, make, batch_size=batch_size, seed=seed, **options)


def _sentence_units(document: str) -> list[str]:
    """Sentences, each but the first with the blank before it, which some tokenizers see; a blank line ends one too."""
    first, *others = (s for paragraph in _BLANK_LINES.split(document) for s in split_sentences(paragraph))
    return [first, *(f" {sentence}" for sentence in others)]


class _Line(NamedTuple):
    """A stretch as a model reads it; see `mask_row`."""

    ids: np.ndarray
    starts: np.ndarray
    inside: np.ndarray
    types: np.ndarray
    order: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Make:
    """Rows -> batch; see `Make`."""

    tokens: Tokens
    chunks: Chunks
    pairs: np.ndarray  # which chunks become two segments
    borders: tuple[np.ndarray, np.ndarray]
    frame: Frame
    mask: int
    pad: int
    replacements: np.ndarray
    rate: float
    ngram: int
    sentence_order: bool
    packed: bool
    lengths: Sequence[int]
    most: Sequence[int]  # hidden tokens in a row, at most

    def __call__(self, rows: list[Row], bucket: int) -> Batch:
        shape, most = (len(rows), self.lengths[bucket]), (len(rows), self.most[bucket])
        ids, types, packs = np.full(shape, self.pad, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        positions, labels = np.zeros(most, np.int32), np.full(most, IGNORED, np.int32)
        order = np.full(len(rows), NO_PAIR, np.int32)
        for i, row in enumerate(rows):
            place = found = 0
            for number, example in enumerate(row.examples, 1):
                rng = row.rng(example)
                line = self._line(example, rng)
                masked = mask_row(
                    *line[:3],
                    mask=self.mask,
                    replacements=self.replacements,
                    rate=self.rate,
                    longest=self.ngram,
                    rng=rng,
                )
                stop, until = place + len(line.ids), found + len(masked.positions)
                ids[i, place:stop], types[i, place:stop], packs[i, place:stop] = masked.ids, line.types, number
                positions[i, found:until], labels[i, found:until] = masked.positions + place, masked.labels
                order[i], place, found = line.order, stop, until
        batch = {"input_ids": ids, "segment_ids": types, "label_positions": positions, "labels": labels}
        batch |= {"packs": packs} if self.packed else {"attention_mask": packs > 0}
        return batch | ({"order_labels": order} if self.sentence_order else {})

    def _line(self, example: int, rng: np.random.Generator) -> _Line:
        start, stop = int(self.chunks.starts[example]), int(self.chunks.stops[example])
        frame = self.frame
        if not self.pairs[example]:
            return self._joined([frame.before, (start, stop), frame.after], (0, 0, 0), NO_PAIR)
        borders = self.tokens.units[self.borders[0][example] : self.borders[1][example]]
        one, two, order = split_pair(start, stop, borders, rng)
        second = frame.second_type
        return self._joined([frame.first, one, frame.middle, two, frame.last], (0, 0, 0, second, second), order)

    def _joined(self, parts: list[tuple[int, ...]], types: Sequence[int], order: int) -> _Line:
        """Special tokens at even places of `parts`, stretches of text at odd ones."""
        ids, starts, inside = [], [], []
        for place, part in enumerate(parts):
            text = slice(*part) if place % 2 else None
            ids.append(np.array(part, np.int32) if text is None else self.tokens.ids[text].astype(np.int32))
            size = len(ids[-1])
            known = text is not None and len(self.tokens.words)
            starts.append(self.tokens.words[text] if known else np.ones(size, bool))
            inside.append(np.full(size, 0 if text is None else place // 2 + 1))
        sizes = [len(content) for content in ids]
        joined = np.concatenate(ids), np.concatenate(starts), np.concatenate(inside)
        return _Line(*joined, types=np.repeat(types, sizes), order=order)
