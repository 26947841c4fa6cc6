"""Flax Linen modules, one idea per file."""

from flaxcompress.nn.add_norm import Norm
from flaxcompress.nn.cache import Cache, cache_slots, cut, grow, is_ring, lay_out, stack_up
from flaxcompress.nn.context import Context
from flaxcompress.nn.depthwise import held_inputs
from flaxcompress.nn.heads import HeadInputs, pool_sequence, register_head
from flaxcompress.nn.init_cache import init_cache
from flaxcompress.nn.layer import Layer
from flaxcompress.nn.linear import GRADIENT_MOMENT, INPUTS, Linear
from flaxcompress.nn.stack import Stack
from flaxcompress.nn.transformer import Transformer, TransformerOutput, run

__all__ = [
    "GRADIENT_MOMENT",
    "INPUTS",
    "Cache",
    "Context",
    "HeadInputs",
    "Layer",
    "Linear",
    "Norm",
    "Stack",
    "Transformer",
    "TransformerOutput",
    "cache_slots",
    "cut",
    "grow",
    "held_inputs",
    "init_cache",
    "is_ring",
    "lay_out",
    "pool_sequence",
    "register_head",
    "run",
    "stack_up",
]
