"""Errors weigh as they show in the output: whitened SVD (SVD-LLM, Wang et al. 2024), in its output-PCA form."""

from __future__ import annotations

import numpy as np

from flaxcompress import linalg
from flaxcompress.compress.metrics.base import INPUTS, Metric, Statistics


def factorize(weight: np.ndarray, rank: int, statistics: Statistics) -> linalg.Factors:
    """Minimises E‖x(W - AB)‖²."""
    return linalg.output_pca(weight, rank, statistics.input_moments)


ACTIVATION = Metric(factorize, frozenset({INPUTS}))
