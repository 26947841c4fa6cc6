"""Rows weigh by the size of their input: ASVD (Yuan et al. 2023)."""

from __future__ import annotations

import numpy as np

from flaxcompress import linalg
from flaxcompress.compress.metrics.base import INPUTS, Metric, Statistics

ALPHA = 0.5  # the paper's


def factorize(weight: np.ndarray, rank: int, statistics: Statistics) -> linalg.Factors:
    """Minimises ‖S(W - AB)‖², S_ii = rms(x_i)^½. The paper takes the mean of |x_i|; second moments have the rms."""
    assert statistics.input_moments is not None
    power = np.maximum(np.diagonal(statistics.input_moments).astype(np.float64), 0.0)
    return linalg.two_sided_svd(weight, rank, power**ALPHA, np.ones(np.shape(weight)[1]))


ASVD = Metric(factorize, frozenset({INPUTS}))
