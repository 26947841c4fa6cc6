"""Rows weigh by their Fisher information: FWSVD (Hsu et al. 2022)."""

from __future__ import annotations

import numpy as np

from flaxcompress import linalg
from flaxcompress.compress.metrics.base import FISHER, Metric, Statistics


def factorize(weight: np.ndarray, rank: int, statistics: Statistics) -> linalg.Factors:
    """Minimises ‖S(W - AB)‖², S_ii² = Σ_j F_ij."""
    assert statistics.fisher is not None
    rows = statistics.fisher.astype(np.float64).sum(1)
    return linalg.two_sided_svd(weight, rank, rows, np.ones(np.shape(weight)[1]))


FISHER_ROWS = Metric(factorize, frozenset({FISHER}))
