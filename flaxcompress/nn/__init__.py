"""Flax Linen modules, one idea per file."""

from flaxcompress.nn.cache import Cache, cache_slots, cut, grow, is_ring, lay_out, stack_up
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
    "cache_slots",
    "cut",
    "grow",
    "init_cache",
    "is_ring",
    "lay_out",
    "run",
    "stack_up",
]
