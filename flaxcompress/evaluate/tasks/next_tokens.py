"""How well a causal language model predicts the tokens of documents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flaxcompress.data.batches import IGNORED
from flaxcompress.data.documents import Corpus
from flaxcompress.data.frame import check_vocabulary, find_frame, whole_tokenizer
from flaxcompress.data.rows import chunked
from flaxcompress.encoding import bucket_length
from flaxcompress.evaluate.tasks.task import Result
from flaxcompress.evaluate.tasks.token_sums import TokenSums
from flaxcompress.model import Model
from flaxcompress.progress import progress_bar


class Window(NamedTuple):
    """A stretch of a document's ids; those from `first` on count."""

    ids: Sequence[int]
    first: int


def next_tokens(
    model: Model, corpus: Corpus, *, reference: Model | None, length: int, batch_size: int, progress: bool
) -> Result:
    """n documents, tokens and bytes that count, and the figures of the task "lm"; `reference` has the same tokens."""
    documents, size, windows = 0, 0, []
    for ids, counted in _documents(model, corpus):
        documents += 1
        size += counted
        windows += windows_of(ids, length)
    if not windows:
        raise ValueError("lm: every document is a single token: there is none to predict")
    sums, order = TokenSums(model, reference), np.argsort([len(w.ids) for w in windows], kind="stable")[::-1]
    count = min(batch_size, 1 << (len(windows) - 1).bit_length())
    with progress_bar("lm", len(windows), show=progress) as advance:
        for start in range(0, len(order), count):
            chosen = [windows[i] for i in order[start : start + count]]
            sums.add(_batch(chosen, bucket_length(len(chosen[0].ids), length), count, model.config.pad_token))
            advance(len(chosen))
    out: Result = {"n": documents, "tokens": round(sums.sums["tokens"]), "bytes": size}
    for prefix in ("", "reference_") if reference is not None else ("",):
        out |= sums.result(prefix)
        out[f"{prefix}bits_per_byte"] = sums.sums[f"{prefix}nats"] / math.log(2) / size
    return out if reference is None else out | sums.compared()


def windows_of(ids: Sequence[int], length: int) -> Iterator[Window]:
    """Stretches of up to `length` ids; each id but the first counts once, in later stretches after half of `length`."""
    begin, known = 0, 1
    while known < len(ids):
        yield Window(ids[begin : begin + length], known - begin)
        known = min(len(ids), begin + length)
        begin = known - length // 2


def _documents(model: Model, corpus: Corpus) -> Iterator[tuple[list[int], int]]:
    """The ids of each document, after the token that begins a text where there is one, and how many bytes count.

    White space around a document is left out. Without such a token the document's first one has nothing before it that
    predicts it: neither the token nor its bytes count.
    """
    before, tokenizer = find_frame(model.assets).before, whole_tokenizer(model.assets)
    for chunk in chunked(text.strip() for text in corpus.documents()):
        for text, found in zip(chunk, tokenizer.encode_batch(chunk, add_special_tokens=False), strict=True):
            if not found.ids:
                continue
            check_vocabulary(max(found.ids), model.config.vocabulary)
            known = 0 if before else found.offsets[0][1]
            yield [*before, *found.ids], len(text[known:].encode("utf-8"))


def _batch(windows: Sequence[Window], length: int, count: int, pad: int) -> dict[str, np.ndarray]:
    """The last id of a window is a label alone, so that `length` - 1 ids are read."""
    ids, labels = np.full((count, length - 1), pad, np.int32), np.full((count, length - 1), IGNORED, np.int32)
    mask = np.zeros((count, length - 1), bool)
    for row, (window, first) in enumerate(windows):
        stop = len(window) - 1
        ids[row, :stop], mask[row, :stop] = window[:-1], True
        labels[row, first - 1 : stop] = window[first:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
