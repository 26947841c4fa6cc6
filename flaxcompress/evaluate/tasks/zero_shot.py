"""The task "zero-shot": a sentence encoder that classifies texts by the names of the classes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flaxcompress.data.labelled import Labelled
from flaxcompress.evaluate.tasks.labels import labelled_texts
from flaxcompress.evaluate.tasks.scores import compared
from flaxcompress.evaluate.tasks.task import Result, data_name
from flaxcompress.evaluate.tasks.vectors import vectors_of
from flaxcompress.model import Model

_TASK = "zero-shot"


def zero_shot(
    model: Model,
    *,
    data: Any = None,
    reference: Model | None = None,
    progress: bool = False,
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    template: str = "{}",
    hold_out: int = 0,
) -> Result:
    """data, n, accuracy, macro_f1, matthews where there are two classes, and f1_by_class; with a reference, agreement.

    A text's class is the one whose name, put into the template, has the vector of highest cosine with the text's.

    Args:
      data: tsv, jsonl or parquet files, or (text, label) items.
      columns: of the text and the label; by default the reader's choice and "label".
      labels: the names of the classes, in order, where the data's labels are numbers.
      template: a text with {} in place of the name, such as "This text is about {}."

    Raises ValueError for pairs of texts, for labels that are numbers without names, and for a template without {}.
    """
    if "{}" not in template:
        raise ValueError(f"{_TASK}: the template {template!r} has no place {{}} for the name of a class")
    found = labelled_texts(data, _TASK, columns=columns, hold_out=hold_out)
    if not all(isinstance(text, str) for text in found.texts):
        raise ValueError(f"{_TASK}: single texts are needed, not pairs; name the columns of text and label")
    names = _names(found, labels)
    texts = [template.replace("{}", name) for name in names]
    chosen = [_nearest(one, found, texts, progress) for one in (model, reference) if one is not None]
    head = {"data": data_name(data, "given texts"), "n": len(found.texts), "classes": list(names)}
    originals = chosen[1] if len(chosen) > 1 else None
    return head | compared(found.labels, chosen[0], originals, names, classes=len(names))


def _names(found: Labelled, labels: Sequence[str]) -> tuple[str, ...]:
    if not all(name.isdecimal() for name in found.names):
        if labels:
            raise ValueError(f"{_TASK}: the data name their classes ({', '.join(found.names)[:200]}); leave out labels")
        return found.names
    highest = max(int(found.names[i]) for i in np.unique(found.labels))
    if len(labels) <= highest or found.names != tuple(str(i) for i in range(len(found.names))):
        raise ValueError(
            f"{_TASK}: the data's labels are numbers up to {highest}, which say nothing about their classes; name "
            f"{highest + 1} or more in order: --labels"
        )
    return tuple(labels)


def _nearest(model: Model, found: Labelled, classes: list[str], progress: bool) -> np.ndarray:
    texts = [str(text) for text in found.texts]
    vectors, names = (vectors_of(model, each, _TASK, progress=progress) for each in (texts, classes))
    lengths = np.linalg.norm(names, axis=1)
    return (vectors @ (names / np.where(lengths > 0, lengths, 1.0)[:, None]).T).argmax(-1)
