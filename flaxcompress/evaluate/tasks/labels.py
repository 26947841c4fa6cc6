"""Labels of data, and the classes of a model that they mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flaxcompress.config import closest
from flaxcompress.data.labelled import Labelled, find_names, read_labelled
from flaxcompress.evaluate.tasks.task import last_of, need_data
from flaxcompress.model import Model


def labelled_texts(
    data: Any, task: str, *, columns: Sequence[str], hold_out: int, regression: bool = False
) -> Labelled:
    """Labelled texts of files, or given as (text, label) or (text, text, label) each.

    Args:
      columns: of the text, of the second one where there are pairs, and of the label.
    """
    need_data(
        data, task, "a tsv or jsonl file with texts and labels (--columns names them), or a list of (text, label)"
    )
    if columns and len(columns) not in (2, 3):
        raise ValueError(f"{task}: columns are those of text and label, or of two texts and label; got {len(columns)}")
    named: dict[str, Any] = {"regression": regression, "max_bad_lines": 0}
    if columns:
        named |= {"text": columns[0], "pair": columns[1] if len(columns) == 3 else None, "label": columns[-1]}
    if isinstance(data, Labelled):
        found = data
    elif isinstance(data, (list, tuple)) and data and isinstance(data[0], (list, tuple)):
        found = _given(data, task, regression)
    else:
        found = read_labelled(data, **named)
    rows = last_of(range(len(found.labels)), hold_out, task)
    return Labelled([found.texts[i] for i in rows], found.labels[rows], found.names)  # pyright: ignore[reportArgumentType]


def _given(data: Sequence[Any], task: str, regression: bool) -> Labelled:
    texts, labels = [], []
    for number, row in enumerate(data):
        *parts, label = row
        if len(parts) not in (1, 2) or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{task}: item {number} is no (text, label) or (text, text, label): {row!r:.80}")
        texts.append(parts[0] if len(parts) == 1 else tuple(parts))
        labels.append(label)
    if regression:
        return Labelled(texts, np.array(labels, np.float32), ())
    words = [str(label) for label in labels]
    names = find_names(words)
    return Labelled(texts, np.array([names.index(word) for word in words], np.int32), names)


def with_names_used(found: Labelled) -> Labelled:
    """Labelled texts whose names are only those that occur."""
    used, labels = np.unique(found.labels, return_inverse=True)
    return Labelled(found.texts, labels.astype(np.int32), tuple(found.names[i] for i in used))


def class_names(model: Model, task: str, labels: Sequence[str]) -> tuple[str, ...]:
    """The names of a model's classes: those given, else its own (config.json's id2label); none where it has none."""
    names, count = tuple(labels) or model.assets.classes, model.config.classes
    if labels and (len(names) != count or len(set(names)) != count):
        raise ValueError(f"{task}: labels must name the model's {count} classes in order, each once; got {len(names)}")
    return names if len(names) == count else ()


def class_numbers(model: Model, task: str, names: Sequence[str], labels: Sequence[str] = ()) -> np.ndarray:
    """Which of the model's classes each label of the data means: by its name, else as the class's number.

    Case may differ where that confuses no two classes. Raises ValueError naming the classes for a label that is none.
    """
    own, count = class_names(model, task, labels), model.config.classes
    for read in (str, str.casefold):
        numbers = {read(name): i for i, name in enumerate(own)}
        if len(numbers) == len(own) and all(read(name) in numbers for name in names):
            return _distinct(task, names, [numbers[read(name)] for name in names])
    if all(name.isdecimal() and int(name) < count for name in names):
        return _distinct(task, names, [int(name) for name in names])
    if not own:
        raise ValueError(
            f"{task}: the data's labels are {_short(names)}, and the model does not name its {count} classes "
            f"(config.json's id2label): labels must be 0 to {count - 1}, or name the classes in order: --labels"
        )
    stranger = next(name for name in reversed(names) if name not in own)  # of numbers, the highest
    raise ValueError(f"{task}: the model has no class {stranger!r:.60}; {closest(stranger, own)}")


def _distinct(task: str, names: Sequence[str], numbers: list[int]) -> np.ndarray:
    first: dict[int, str] = {}
    for name, number in zip(names, numbers, strict=True):
        if first.setdefault(number, name) != name:
            raise ValueError(f"{task}: the labels {first[number]!r} and {name!r} mean the same class; spell it one way")
    return np.array(numbers, np.int64)


def _short(names: Sequence[str]) -> str:
    return ", ".join(name[:40] for name in names[:6]) + (", …" if len(names) > 6 else "")
