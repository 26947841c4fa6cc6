"""The task "sts", semantic textual similarity (Cer et al. 2017)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from flaxcompress.data.readers import Pair, read_pairs
from flaxcompress.evaluate import metrics
from flaxcompress.evaluate.tasks.task import Result
from flaxcompress.evaluate.tasks.vectors import vectors_of
from flaxcompress.model import Model


def sts(model: Model, *, data: Any = None, reference: Model | None = None, progress: bool = False) -> Result:
    """data, n and spearman, of cosines with human scores; also reference_spearman, and mean_cosine of all sentences.

    Args:
      data: a tsv or jsonl file with sentence1, sentence2 and score, or a list of such triples.

    Raises ValueError without data, and for scores that are all equal.
    """
    name, pairs = _pairs(data)
    scores = np.array([score for _, _, score in pairs])
    if len(pairs) < 2 or (scores == scores[0]).all():
        raise ValueError(
            f"sts: {name}: the scores of all {len(pairs)} pairs are {scores[0]:g}; a correlation needs some that differ"
        )
    rows: dict[str, int] = {}
    left = np.array([rows.setdefault(first, len(rows)) for first, _, _ in pairs])
    right = np.array([rows.setdefault(second, len(rows)) for _, second, _ in pairs])
    texts = list(rows)
    vectors = vectors_of(model, texts, "sts", progress=progress)
    out: Result = {"data": name, "n": len(pairs), "spearman": _score(vectors, left, right, scores, "the model")}
    if reference is not None:
        originals = vectors_of(reference, texts, "sts", progress=progress)
        out["reference_spearman"] = _score(originals, left, right, scores, "the reference")
        same_width = vectors.shape[1] == originals.shape[1]
        out["mean_cosine"] = metrics.mean_cosine(vectors, originals) if same_width else None
    return out


def _score(vectors: np.ndarray, left: np.ndarray, right: np.ndarray, scores: np.ndarray, who: str) -> float:
    cosines = metrics.cosines(vectors[left], vectors[right])
    if (cosines == cosines[0]).all():
        raise ValueError(
            f"sts: {who} gives all {len(cosines)} pairs the similarity {cosines[0]:g}: it tells nothing apart"
        )
    return metrics.spearman(cosines, scores)


def _pairs(data: Any) -> tuple[str, list[Pair]]:
    if data is None:
        raise ValueError("sts: no data; give a file with sentence1, sentence2 and score, or a list of such triples")
    if isinstance(data, (str, Path)):
        return os.path.basename(data), read_pairs(data)
    return "given pairs", _checked(data)


def _checked(data: Iterable[Any]) -> list[Pair]:
    pairs = []
    for number, row in enumerate(data):
        try:
            first, second, score = row
            pairs.append((first, second, float(score)))
        except (TypeError, ValueError):
            raise ValueError(f"sts: item {number} is no (sentence1, sentence2, score): {row!r:.80}") from None
        if not (isinstance(first, str) and isinstance(second, str) and np.isfinite(pairs[-1][2])):
            raise ValueError(f"sts: item {number} is no (sentence1, sentence2, score): {row!r:.80}")
    if not pairs:
        raise ValueError("sts: the list of pairs is empty")
    return pairs
