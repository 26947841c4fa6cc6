"""How far apart tokens are that attend to each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Complex, Float

from flaxcompress.compress.calibrate import Batch
from flaxcompress.config import ModelConfig
from flaxcompress.model import Model

_EVEN = 32  # tokens over which attention is taken to be even where none was measured


def attention_distances(model: Model, batches: Sequence[Batch]) -> Float[np.ndarray, "L H Δ"]:
    """The share of every head's attention at each distance t - s of a query t and a key s, from 1 - T to T - 1.

    T is the longest batch's length; padding is left out.
    """
    config, longest = model.config, max(ids.shape[1] for ids, _ in batches)
    total = np.zeros((config.layers, config.heads, 2 * longest - 1))
    for ids, mask in batches:
        places = np.arange(ids.shape[1])
        slots = (places[:, None] - places + longest - 1).ravel()
        for layer, probabilities in enumerate(model(ids, mask, output_attentions=True).attentions):
            summed = np.einsum("bhts,bt->hts", np.asarray(probabilities), mask)
            for head, each in enumerate(summed):
                total[layer, head] += np.bincount(slots, each.ravel(), total.shape[-1])
    return total / np.maximum(total.sum(-1, keepdims=True), np.finfo(np.float64).tiny)


def even_distances(config: ModelConfig) -> Float[np.ndarray, "L H Δ"]:
    """The same without a look at data, as if attention were even over a stretch of 32 tokens."""
    length = min(_EVEN, config.positions)
    distances = np.arange(1 - length, length)
    share = (length - np.abs(distances)) * (distances >= 0 if config.causal else 1.0)
    return np.broadcast_to(share / share.sum(), (config.layers, config.heads, len(share)))


def mean_rotation(
    frequencies: Float[np.ndarray, " p"], shares: Float[np.ndarray, "*B Δ"]
) -> Complex[np.ndarray, "*B p"]:
    """E[e^(-iθ_j (t - s))] over the distances that a head attends to, given as `attention_distances` gives them.

    Where rotary positions are left out, the score of least squared error has this number in place of the rotation. At
    1 the positions do not matter; 1 - |·|² is the part of the squared score that is lost.
    """
    reach = shares.shape[-1] // 2
    turned = np.exp(-1j * np.outer(np.arange(-reach, reach + 1), np.asarray(frequencies, np.float64)))
    return shares @ turned
