"""The task "classification": texts, or pairs of texts, and their classes or numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flaxcompress.evaluate.classes import pearson
from flaxcompress.evaluate.metrics import spearman
from flaxcompress.evaluate.tasks.labels import class_numbers, labelled_texts, with_names_used
from flaxcompress.evaluate.tasks.rows import text_logits
from flaxcompress.evaluate.tasks.scores import compared, in_labels
from flaxcompress.evaluate.tasks.task import Result, beside, data_name, need_head, need_text
from flaxcompress.model import Model

_TASK = "classification"


def classification(
    model: Model,
    *,
    data: Any = None,
    reference: Model | None = None,
    progress: bool = False,
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    hold_out: int = 0,
    batch_size: int = 32,
) -> Result:
    """data, n, accuracy, macro_f1, matthews where there are two classes, and f1_by_class; with a reference, agreement.

    A model with one class gives numbers; the figures are then pearson, spearman and mean_squared_error.

    Args:
      data: tsv, jsonl or parquet files, or (text, label) or (text, text, label) items.
      columns: of the text, of the second one where there are pairs, and of the label; by default those that
        `read_labelled` finds.
      labels: the names of the model's classes, in order, where its folder does not say them.
      hold_out: only the last so many items, as training's data/hold_out leaves them.

    Raises ValueError for another head, for labels that the model does not know, and for a line that cannot be read.
    """
    models = [model] if reference is None else [model, reference]
    for one, who in zip(models, ("the model", "the reference"), strict=False):
        need_text(one, _TASK, who=who)
        need_head(one, _TASK, "sequence_classification", who=who)
    regression = model.config.classes == 1
    if any((one.config.classes == 1) != regression for one in models):
        raise ValueError(f"{_TASK}: one of model and reference gives a number, the other classes")
    found = labelled_texts(data, _TASK, columns=columns, hold_out=hold_out, regression=regression)
    head: Result = {"data": data_name(data, "given texts"), "n": len(found.texts)}
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    if regression:
        if labels:
            raise ValueError(f"{_TASK}: the model gives a number, not classes; leave out labels")
        scores = [_number_scores(found.labels, text_logits(one, found.texts, _TASK, **options)[:, 0]) for one in models]
        return head | beside(scores[0], scores[1] if len(scores) > 1 else None)
    found = with_names_used(found)
    numbers = [class_numbers(one, _TASK, found.names, labels) for one in models]
    chosen = [
        in_labels(text_logits(one, found.texts, _TASK, **options).argmax(-1), each)
        for one, each in zip(models, numbers, strict=True)
    ]
    originals = chosen[1] if len(chosen) > 1 else None
    return head | compared(found.labels, chosen[0], originals, found.names, classes=model.config.classes)


def _number_scores(labels: np.ndarray, found: np.ndarray) -> Result:
    wanted, given = labels.astype(np.float64), found.astype(np.float64)
    return {
        "pearson": pearson(wanted, given),
        "spearman": spearman(wanted, given),
        "mean_squared_error": float(np.mean((wanted - given) ** 2)),
    }
