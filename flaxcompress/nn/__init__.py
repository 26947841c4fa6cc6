"""Flax Linen modules, one idea per file."""

from flaxcompress.nn.stack import Stack, layer_params, layer_sets
from flaxcompress.nn.transformer import Transformer, TransformerOutput

__all__ = ["Stack", "Transformer", "TransformerOutput", "layer_params", "layer_sets"]
