"""The figures of tasks that choose a class for each item."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flaxcompress.evaluate.classes import agreement, f1_by_class, macro_f1, matthews
from flaxcompress.evaluate.tasks.task import Result, beside


def in_labels(found: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The data's label for each class found [n], given the class of each label; -1 - c for a class c of none."""
    out = -1 - found
    for label, number in enumerate(numbers):
        out[found == number] = label
    return out


def class_scores(labels: np.ndarray, found: np.ndarray, names: Sequence[str], *, classes: int) -> Result:
    """accuracy, macro_f1, matthews where there are two classes, and f1_by_class of the classes that have labels."""
    out: Result = {"accuracy": agreement(labels, found), "macro_f1": macro_f1(labels, found)}
    if classes == 2:
        out["matthews"] = matthews(labels, found)
    out["f1_by_class"] = {names[c]: score for c, score in f1_by_class(labels, found).items() if c >= 0}
    return out


def compared(
    labels: np.ndarray, found: np.ndarray, originals: np.ndarray | None, names: Sequence[str], *, classes: int
) -> Result:
    """`class_scores`, beside those of the reference and the share of items on which the two agree."""
    own = class_scores(labels, found, names, classes=classes)
    if originals is None:
        return own
    return beside(own, class_scores(labels, originals, names, classes=classes)) | {
        "agreement": agreement(found, originals)
    }
