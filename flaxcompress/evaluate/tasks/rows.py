"""Rows of tokens through a classifier: batches of like lengths, padded to one of a few."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from flaxcompress.data.rows import RowWriter, chunked
from flaxcompress.encoding import bucket_length
from flaxcompress.evaluate.tasks.task import need_count
from flaxcompress.model import Model
from flaxcompress.progress import progress_bar
from flaxcompress.terms import read_terms
from flaxcompress.text import pad_ids

Ids = Sequence[int] | np.ndarray


def text_logits(model: Model, texts: Sequence[Any], task: str, *, batch_size: int, progress: bool) -> np.ndarray:
    """Logits [n, C] of texts, or of pairs of texts; those over the length limit are cut, with a warning."""
    writer = RowWriter(model.assets, model.assets.max_length, vocabulary=model.config.vocabulary)
    for chunk in chunked(texts):
        writer.add(chunk)
    rows = writer.done()
    numbers = range(len(texts))
    ids, types = [rows.row(i) for i in numbers], [rows.row_types(i) for i in numbers]
    out = np.zeros((len(texts), model.config.classes), np.float32)
    for chosen, logits in logits_of(model, ids, types, task, batch_size=batch_size, progress=progress):
        out[chosen] = logits
    return out


def logits_of(
    model: Model, rows: Sequence[Ids], types: Sequence[Ids] | None, task: str, *, batch_size: int, progress: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (numbers of rows, their logits), the longest rows first; of tokens, logits have places for padding too."""
    need_count(task, "batch_size", batch_size)
    config, limit = model.config, model.assets.max_length
    terms = None if config.lexicon is None else read_terms(model.assets)
    order = np.argsort([len(row) for row in rows], kind="stable")[::-1]
    count = min(batch_size, 1 << (max(1, len(rows)) - 1).bit_length())
    with progress_bar(task, len(rows), show=progress) as advance:
        for start in range(0, len(rows), count):
            chosen = order[start : start + count]
            length = bucket_length(max(len(rows[i]) for i in chosen), limit, texts=len(rows))

            def padded(values: Sequence[Any], pad: int = 0, length: int = length) -> Any:
                return pad_ids(values, length, count, pad)

            ids, mask = padded([rows[i] for i in chosen], config.pad_token)
            segments = None if types is None or config.segments < 2 else padded([types[i] for i in chosen])[0]
            features = None if terms is None else padded([terms.find(list(rows[i])) for i in chosen])[0]
            logits = model(ids, mask, segments, feature_ids=features).logits
            yield chosen, np.asarray(logits, np.float32)[: len(chosen)]
            advance(len(chosen))
