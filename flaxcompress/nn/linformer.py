"""Attention to keys and values projected along the sequence (Linformer, Wang et al. 2020)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxcompress.config import Linformer, ModelConfig
from flaxcompress.formats import spec_for, take
from flaxcompress.nn.attention import Attention
from flaxcompress.nn.context import Context
from flaxcompress.nn.linear import weight
from flaxcompress.nn.logical import put_together
from flaxcompress.ops import linformer_attention, project_places


def linformer_of(config: ModelConfig) -> Linformer:
    """The config's kind of attention."""
    assert isinstance(config.attention, Linformer)
    return config.attention


def shares_one(config: ModelConfig) -> bool:
    """Whether all layers share one projection, whose weight then stands outside of layers."""
    return isinstance(config.attention, Linformer) and config.attention.sharing == "layer"


class SequenceProjection(nn.Module):
    """E, a table [positions, h·k]: called with S, it gives the rows of the first S places, [S, h, k] float32.

    Attributes:
      heads: h.
    """

    config: ModelConfig
    address: str
    heads: int = 1

    def setup(self):
        spec, shape = spec_for(self.config, f"{self.address}/table"), (self.config.positions, self._columns)
        normal = nn.initializers.normal(self.config.positions**-0.5)
        self.table = weight(self, "table", lambda key: spec.init(key, shape, normal, table=True))

    @property
    def _columns(self) -> int:
        return self.heads * linformer_of(self.config).length

    def __call__(self, tokens: int) -> Float[Array, "S h k"]:
        if tokens > self.config.positions:
            raise ValueError(
                f"{self.address}: {tokens} tokens, but only {self.config.positions} positions can be projected"
            )
        table = put_together(self.config, f"{self.address}/table", self.table)
        return take(table, jnp.arange(tokens)).reshape(tokens, self.heads, -1)


class LinformerAttention(Attention):
    """As `Attention`, but keys and values are projected from S places to k before; so probabilities are [B, H, T, k].

    The projections are those of the key heads where `sharing` is "none". With "layer", `context.sequence` has them.
    """

    @staticmethod
    def core_flops(config: ModelConfig, length: int) -> float:
        """Operations per token and layer beside the linear maps: the projections, scores, and sums of values."""
        widths = config.query_key_dim + config.head_dim
        return 2.0 * linformer_of(config).length * (config.groups + config.heads) * widths

    def setup(self):
        super().setup()
        config, address, sharing = self.config, self.address, linformer_of(self.config).sharing
        heads = config.groups if sharing == "none" else 1
        if sharing in ("none", "head"):
            self.key_sequence = SequenceProjection(config, f"{address}/key_sequence", heads)
            self.value_sequence = SequenceProjection(config, f"{address}/value_sequence", heads)
        elif sharing == "key_value":
            self.sequence = SequenceProjection(config, f"{address}/sequence", heads)

    def _rows(self, context: Context, tokens: int) -> tuple[Any, Any]:
        sharing = linformer_of(self.config).sharing
        if sharing in ("none", "head"):
            return self.key_sequence(tokens), self.value_sequence(tokens)
        rows = self.sequence(tokens) if sharing == "key_value" else context.sequence
        return rows, rows

    def mix(self, query, key, value, context: Context, *, deterministic: bool, need_probabilities: bool):
        """What tokens take from the projected values, and the probabilities when asked for."""
        config, rows, real = self.config, self._rows(context, key.shape[1]), context.real
        if need_probabilities or (not deterministic and config.attention_dropout > 0):
            key, value = project_places(key, rows[0], real), project_places(value, rows[1], real)
            need = {"deterministic": deterministic, "need_probabilities": need_probabilities}
            return self.core(query, key, value, None, **need)
        return linformer_attention(query, key, value, *rows, real, scale=config.attention_scale), None
