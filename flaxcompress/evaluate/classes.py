"""How well classes were found: accuracy, F1 and Matthews' correlation; plain numpy, float64."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Integer

Classes = Integer[np.ndarray, " N"]


def agreement(a: Classes, b: Classes) -> float:
    """The share of places where two series [N] are equal; of labels and what was found, the accuracy."""
    if a.shape != b.shape or not len(a):
        raise ValueError(f"classes: two series of equal length >= 1 are needed, got {list(a.shape)}, {list(b.shape)}")
    return float(np.mean(a == b))


def f1_by_class(labels: Classes, found: Classes) -> dict[int, float]:
    """2·hits / (labelled + found) of every class that is labelled or found somewhere, by class."""
    return {
        int(c): float(2 * ((labels == c) & (found == c)).sum() / ((labels == c).sum() + (found == c).sum()))
        for c in np.union1d(labels, found)
    }


def macro_f1(labels: Classes, found: Classes) -> float:
    """The mean of `f1_by_class`: every class that occurs counts alike."""
    return float(np.mean(list(f1_by_class(labels, found).values())))


def matthews(labels: Classes, found: Classes) -> float:
    """Matthews' correlation (1975) of two classes, 0 and others; in [-1, 1], 0 where either series is constant."""
    one, two = labels != 0, found != 0
    both, neither = float((one & two).sum()), float((~one & ~two).sum())
    missed, wrong = float((one & ~two).sum()), float((~one & two).sum())
    below = math.sqrt((both + wrong) * (both + missed) * (neither + wrong) * (neither + missed))
    return (both * neither - wrong * missed) / below if below else 0.0


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of two series [N]. Raises ValueError where all values of one are equal, or N < 2."""
    x, y = (np.asarray(series, np.float64) - np.mean(series, dtype=np.float64) for series in (x, y))
    below = math.sqrt(float(x @ x) * float(y @ y))
    if len(x) < 2 or not below:
        raise ValueError(f"pearson: two series of values that differ are needed, got {len(x)} values")
    return float(x @ y) / below
