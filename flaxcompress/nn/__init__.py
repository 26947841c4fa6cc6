"""Flax Linen modules, one idea per file."""

from flaxcompress.nn.layer import Layer
from flaxcompress.nn.linear import INPUTS
from flaxcompress.nn.stack import Stack, layer_sets
from flaxcompress.nn.transformer import Transformer, TransformerOutput

__all__ = ["INPUTS", "Layer", "Stack", "Transformer", "TransformerOutput", "layer_sets"]
