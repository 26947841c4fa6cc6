"""What a model can be evaluated on. A new task is one function and one line in `TASKS`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from flaxcompress.config import closest
from flaxcompress.data.calibration import calibration_text, is_file_source, read_sentences, source_name
from flaxcompress.data.readers import Pair, read_pairs
from flaxcompress.evaluate import metrics
from flaxcompress.model import Model

Result = dict[str, Any]
Task = Callable[..., Result]


def evaluate(model: Model, task: str, *, data: Any = None, reference: Model | None = None) -> Result:
    """Measures a model on a task, and beside it the `reference` it was made from.

    Args:
      task: "fidelity": how close the sentence vectors are to the reference's. "sts": Spearman correlation of cosines
        with human scores, and the reference's own.
      data: fidelity: texts, "FILE" or "FILE:column", or a list of these; by default held-out docstrings of Python. A
        list of texts is taken as it is, files are cut into sentences. sts: a tsv or jsonl file with sentence1,
        sentence2 and score, or a list of such triples.

    Returns a JSON object:
      fidelity: data, n, mean_cosine, rank_correlation, neighbour_overlap_10.
      sts: data, n, spearman; with a reference also reference_spearman, and mean_cosine of all distinct sentences.

    Raises:
      ValueError: an unknown task, a reference or data missing, too few texts, scores that are all equal.
      FileNotFoundError: no such file.
    """
    if task not in TASKS:
        raise ValueError(f"evaluate: unknown task {task!r}; {closest(str(task), TASKS)}")
    return TASKS[task](model, data=data, reference=reference)


def fidelity(model: Model, *, data: Any, reference: Model | None) -> Result:
    """The task "fidelity"."""
    if reference is None:
        raise ValueError("fidelity: a reference is needed, the model whose vectors are to be kept (--reference MODEL)")
    name, texts = _texts(data)
    if len(texts) < 11:
        raise ValueError(f"fidelity: {name}: at least 11 texts are needed, for 10 neighbours each; got {len(texts)}")
    return compare_vectors(model.encode(texts), reference.encode(texts), data=name)


def compare_vectors(vectors: metrics.Vectors, reference: metrics.Vectors, *, data: str) -> Result:
    """The fidelity of sentence vectors [N, D] to those of the reference [N, D'], as report.json holds it.

    D' may differ from D: the mean cosine is then None, since only similarities can be compared.
    """
    same_width = np.shape(vectors)[-1] == np.shape(reference)[-1]
    return {
        "data": data,
        "n": len(vectors),
        "mean_cosine": metrics.mean_cosine(vectors, reference) if same_width else None,
        "rank_correlation": metrics.rank_correlation(vectors, reference),
        "neighbour_overlap_10": metrics.neighbour_overlap(vectors, reference, 10),
    }


def sts(model: Model, *, data: Any, reference: Model | None) -> Result:
    """The task "sts" (semantic textual similarity; Cer et al. 2017)."""
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
    vectors = model.encode(texts)
    out: Result = {"data": name, "n": len(pairs), "spearman": _sts_score(vectors, left, right, scores, "the model")}
    if reference is not None:
        originals = reference.encode(texts)
        out["reference_spearman"] = _sts_score(originals, left, right, scores, "the reference")
        same_width = vectors.shape[1] == originals.shape[1]
        out["mean_cosine"] = metrics.mean_cosine(vectors, originals) if same_width else None
    return out


TASKS: dict[str, Task] = {"fidelity": fidelity, "sts": sts}


def _sts_score(vectors: np.ndarray, left: np.ndarray, right: np.ndarray, scores: np.ndarray, who: str) -> float:
    cosines = metrics.cosines(vectors[left], vectors[right])
    if (cosines == cosines[0]).all():
        raise ValueError(
            f"sts: {who} gives all {len(cosines)} pairs the similarity {cosines[0]:g}: it tells nothing apart"
        )
    return metrics.spearman(cosines, scores)


def _texts(data: Any) -> tuple[str, list[str]]:
    if data is None:
        text = calibration_text()
        return f"{text.name}, held out", list(text.held_out)
    if isinstance(data, (str, Path)):
        return source_name([data]), list(read_sentences([data]))
    items = list(data)
    if items and isinstance(items[0], (str, Path)) and is_file_source(items[0]):
        return source_name(items), list(read_sentences(items))
    return "given texts", items


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
