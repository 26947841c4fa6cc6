"""The task "fidelity": how close sentence vectors are to those of the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flaxcompress.data.calibration import calibration_text, is_file_source, read_sentences, source_name
from flaxcompress.evaluate import metrics
from flaxcompress.evaluate.tasks.task import Result
from flaxcompress.evaluate.tasks.vectors import vectors_of
from flaxcompress.model import Model


def fidelity(model: Model, *, data: Any = None, reference: Model | None = None, progress: bool = False) -> Result:
    """data, n, mean_cosine, rank_correlation and neighbour_overlap_10 of sentence vectors to the reference's.

    Args:
      data: texts, "FILE" or "FILE:column", or a list of these; by default held-out docstrings of Python. A list of
        texts is taken as it is, files are cut into sentences.

    Raises ValueError without a reference, and for fewer than 11 texts.
    """
    if reference is None:
        raise ValueError("fidelity: a reference is needed, the model whose vectors are to be kept (--reference MODEL)")
    name, texts = _texts(data)
    if len(texts) < 11:
        raise ValueError(f"fidelity: {name}: at least 11 texts are needed, for 10 neighbours each; got {len(texts)}")
    vectors, originals = (vectors_of(one, texts, "fidelity", progress=progress) for one in (model, reference))
    return compare_vectors(vectors, originals, data=name)


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
