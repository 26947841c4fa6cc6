"""Errors weigh as they show in the loss, by a Kronecker-factored Fisher matrix (K-FAC, Martens & Grosse 2015)."""

from __future__ import annotations

import numpy as np

from flaxcompress import linalg
from flaxcompress.compress.metrics.base import GRADIENTS, INPUTS, Metric, Statistics


def factorize(weight: np.ndarray, rank: int, statistics: Statistics) -> linalg.Factors:
    """Minimises tr EᵀCEG, E = W - AB: twice the loss that E costs, as far as inputs and gradients are independent."""
    assert statistics.input_moments is not None and statistics.gradient_moments is not None
    return linalg.kronecker_svd(weight, rank, statistics.input_moments, statistics.gradient_moments)


TWO_SIDED = Metric(factorize, frozenset({INPUTS, GRADIENTS}))
