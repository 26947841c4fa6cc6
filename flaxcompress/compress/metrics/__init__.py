"""Metrics in which kernels are cut to a low rank. A new metric is one file and one entry in `METRICS`."""

from flaxcompress.compress.metrics.activation import ACTIVATION
from flaxcompress.compress.metrics.asvd import ASVD
from flaxcompress.compress.metrics.base import FISHER, GRADIENTS, INPUTS, Metric, Statistics
from flaxcompress.compress.metrics.fisher import FISHER_ROWS
from flaxcompress.compress.metrics.none import NONE
from flaxcompress.compress.metrics.pca import PCA
from flaxcompress.compress.metrics.two_sided import TWO_SIDED

METRICS: dict[str, Metric] = {
    "none": NONE,
    "pca": PCA,
    "fisher": FISHER_ROWS,
    "asvd": ASVD,
    "activation": ACTIVATION,
    "two_sided": TWO_SIDED,
}

__all__ = ["FISHER", "GRADIENTS", "INPUTS", "METRICS", "Metric", "Statistics"]
