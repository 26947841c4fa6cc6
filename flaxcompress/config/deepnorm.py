"""DeepNorm's constants (Wang et al. 2022, "DeepNet", figure 2)."""

from __future__ import annotations

from typing import NamedTuple


class DeepNorm(NamedTuple):
    """Sublayers give norm(alpha·x + f(x)); the weights of f, but for queries' and keys', start beta times smaller."""

    alpha: float
    beta: float


def deepnorm(layers: int) -> DeepNorm:
    """Of an encoder or a decoder that stands alone."""
    return DeepNorm((2 * layers) ** 0.25, (8 * layers) ** -0.25)


def deepnorm_encoder(layers: int, decoder_layers: int) -> DeepNorm:
    """Of an encoder that a decoder attends to."""
    depth = (layers**4 * decoder_layers) ** (1 / 16)
    return DeepNorm(0.81 * depth, 0.87 / depth)


def deepnorm_decoder(layers: int) -> DeepNorm:
    """Of a decoder that attends to an encoder."""
    return DeepNorm((3 * layers) ** 0.25, (12 * layers) ** -0.25)
