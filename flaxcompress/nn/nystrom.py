"""Attention approximated from landmarks (Nyströmformer, Xiong et al. 2021)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxcompress.config import ModelConfig, Nystrom
from flaxcompress.formats.base import vector_init
from flaxcompress.nn.attention import Attention
from flaxcompress.nn.context import Context
from flaxcompress.nn.linear import weight
from flaxcompress.ops import depthwise, nystrom_attention, nystrom_factors, sum_values


def nystrom_of(config: ModelConfig) -> Nystrom:
    """The config's kind of attention."""
    assert isinstance(config.attention, Nystrom)
    return config.attention


class ValueConvolution(nn.Module):
    """The values of every head convolved over the sequence, [B, T, H, d] -> [B, T, H, d]; one filter per head."""

    config: ModelConfig
    address: str

    def setup(self):
        normal = nn.initializers.normal(self.config.initializer_range)
        init = vector_init(self.config, f"{self.address}/taps", normal)
        self.taps = weight(self, "taps", init, (nystrom_of(self.config).convolution, self.config.heads))

    def __call__(self, value: Float[Array, "B T H d"]) -> Float[Array, "B T H d"]:
        taps = jnp.repeat(self.taps, value.shape[-1], 1)
        return depthwise(value.reshape(*value.shape[:2], -1), taps, causal=False).reshape(value.shape)


class NystromAttention(Attention):
    """As `Attention`, but time and memory are linear in T (see `nystrom_attention`).

    Probabilities, when asked for, are the approximated matrix [B, H, T, T], whose entries may lie outside of 0 … 1.
    Dropout is that of what landmarks see of tokens.
    """

    @staticmethod
    def core_flops(config: ModelConfig, length: int) -> float:
        """Operations per token and layer beside the linear maps, at `length` tokens."""
        kind = nystrom_of(config)
        m, heads, scored, width = kind.landmarks, config.heads, config.query_key_dim, config.head_dim
        both = (
            2.0 * heads * (2 * m * (scored + width) + kind.convolution * width)
        )  # of the right factor, and its values
        if length <= m:
            return both
        middle = 2.0 * m * m * heads * (scored + 4 * kind.iterations * m) / length
        return both + 2.0 * m * heads * (2 * scored + m) + middle

    def setup(self):
        super().setup()
        if nystrom_of(self.config).convolution:
            self.convolution = ValueConvolution(self.config, f"{self.address}/convolution")
        self.drop = nn.Dropout(self.config.attention_dropout)

    def mix(self, query, key, value, context: Context, *, deterministic: bool, need_probabilities: bool):
        """What tokens take from the values, and the probabilities when asked for."""
        config, kind, real = self.config, nystrom_of(self.config), context.real
        settings = {"landmarks": kind.landmarks, "iterations": kind.iterations, "scale": config.attention_scale}
        value = value if real is None else jnp.where(real[:, :, None, None], value, 0)
        probabilities = None
        if need_probabilities or (not deterministic and config.attention_dropout > 0):
            left, right = nystrom_factors(query, key, real, **settings)
            y = sum_values(left, self.drop(right, deterministic=deterministic), value)
            probabilities = jnp.matmul(left, right) if need_probabilities else None
        else:
            y = nystrom_attention(query, key, value, real, **settings)
        if kind.convolution:
            y = y + self.convolution(jnp.repeat(value, config.heads // config.groups, 2))
        return y, probabilities
