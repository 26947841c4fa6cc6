"""What is computed, on plain arrays."""

from flaxcompress.ops.activation import activate
from flaxcompress.ops.attention import attend_values, attention_probabilities, both, dot_product_attention, sight
from flaxcompress.ops.bits import on_host, pack, packed_width, unpack
from flaxcompress.ops.depthwise import depthwise
from flaxcompress.ops.label_scores import LabelScores, label_scores
from flaxcompress.ops.linformer import linformer_attention, project_places
from flaxcompress.ops.norm import layer_norm, rms_norm
from flaxcompress.ops.nystrom import nystrom_attention, nystrom_factors, sum_values
from flaxcompress.ops.rotary import frequencies, rotate, rotation

__all__ = [
    "LabelScores",
    "activate",
    "attend_values",
    "attention_probabilities",
    "both",
    "depthwise",
    "dot_product_attention",
    "frequencies",
    "label_scores",
    "layer_norm",
    "linformer_attention",
    "nystrom_attention",
    "nystrom_factors",
    "on_host",
    "pack",
    "packed_width",
    "project_places",
    "rms_norm",
    "rotate",
    "rotation",
    "sight",
    "sum_values",
    "unpack",
]
