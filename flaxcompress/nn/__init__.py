"""Flax Linen modules, one idea per file."""

from flaxcompress.nn.cache import Cache, is_ring
from flaxcompress.nn.context import Context
from flaxcompress.nn.init_cache import init_cache
from flaxcompress.nn.layer import Layer
from flaxcompress.nn.linear import INPUTS
from flaxcompress.nn.stack import Stack
from flaxcompress.nn.transformer import Transformer, TransformerOutput, run

__all__ = [
    "INPUTS",
    "Cache",
    "Context",
    "Layer",
    "Stack",
    "Transformer",
    "TransformerOutput",
    "init_cache",
    "is_ring",
    "run",
]
