"""What is computed, on plain arrays."""

from flaxcompress.ops.activation import activate
from flaxcompress.ops.attention import attend_values, attention_probabilities, dot_product_attention
from flaxcompress.ops.bits import on_host, pack, packed_width, unpack
from flaxcompress.ops.norm import layer_norm

__all__ = [
    "activate",
    "attend_values",
    "attention_probabilities",
    "dot_product_attention",
    "layer_norm",
    "on_host",
    "pack",
    "packed_width",
    "unpack",
]
