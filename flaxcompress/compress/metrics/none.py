"""All errors weigh alike: the truncated SVD (Eckart & Young 1936)."""

from __future__ import annotations

import numpy as np

from flaxcompress import linalg
from flaxcompress.compress.metrics.base import Metric, Statistics


def factorize(weight: np.ndarray, rank: int, statistics: Statistics) -> linalg.Factors:
    """Minimises ‖W - AB‖²."""
    del statistics
    return linalg.output_pca(weight, rank)


NONE = Metric(factorize)
