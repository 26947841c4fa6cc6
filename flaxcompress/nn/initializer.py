"""How random weights are drawn, by the config's kind of initialiser and the role of a matrix."""

from __future__ import annotations

import math
import re

import flax.linen as nn

from flaxcompress.config import ModelConfig
from flaxcompress.formats.base import Initializer

# A normal distribution cut at ±2 standard deviations has this one.
_TRUNCATED = 0.87962566103423978
_QUERY_OR_KEY = r".*layers/\d+/\w*attention/(query|key)"
_IN_LAYERS = r".*layers/\d+/.*"


def kernel_initializer(config: ModelConfig, address: str, n: int, m: int) -> Initializer:
    """Of the kernel [n, m] of the linear map at `address`; the fans are those of the whole matrix in any format.

    "xavier": variance 2/(n + m) (Glorot & Bengio 2010). "deepnorm": the same, times the gain's square for all that is
    added to the residual stream: values, outputs and feed-forward (Wang et al. 2022, figure 2).
    """
    if config.initializer in ("normal", "truncated_normal"):
        return table_initializer(config)
    scaled = re.fullmatch(_IN_LAYERS, address) and not re.fullmatch(_QUERY_OR_KEY, address)
    gain = config.initializer_gain if config.initializer == "deepnorm" and scaled else 1.0
    return nn.initializers.normal(gain * math.sqrt(2 / (n + m)))


def table_initializer(config: ModelConfig) -> Initializer:
    """Of embedding tables, whose rows are looked up: deviation `initializer_range` whatever their size."""
    if config.initializer == "truncated_normal":
        return nn.initializers.truncated_normal(config.initializer_range / _TRUNCATED)
    return nn.initializers.normal(config.initializer_range)
