"""Inputs are projected on their principal components, as SliceGPT does (Ashkboos et al. 2024)."""

from __future__ import annotations

import numpy as np

from flaxcompress import linalg
from flaxcompress.compress.metrics.base import INPUTS, Metric, Statistics


def factorize(weight: np.ndarray, rank: int, statistics: Statistics) -> linalg.Factors:
    """Minimises E‖x - xQQᵀ‖² over orthonormal Q [n, R]; A = Q and B = QᵀW. Nothing is centred, so no bias is added."""
    assert statistics.input_moments is not None
    return linalg.input_pca(weight, rank, statistics.input_moments)


PCA = Metric(factorize, frozenset({INPUTS}))
