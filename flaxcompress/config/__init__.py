"""ModelConfig and its parts: frozen, validated on construction, JSON both ways."""

from flaxcompress.config.adapters import Adapters
from flaxcompress.config.attention import ATTENTION_KINDS, AttentionKind, Latent, Linformer, Nystrom
from flaxcompress.config.classifier import Classifier
from flaxcompress.config.deltas import Deltas
from flaxcompress.config.format_rule import FormatRule
from flaxcompress.config.lexicon import Lexicon
from flaxcompress.config.model import (
    CLASSIFIERS,
    GENERATING,
    HEADS,
    ModelConfig,
    add_head_name,
    own_heads,
)
from flaxcompress.config.names import ACTIVATIONS, closest, reject_unknown
from flaxcompress.config.patches import Patches
from flaxcompress.config.rotary import Rotary
from flaxcompress.config.sharing import PARTS, SUBLAYERS, Sets, Sharing

__all__ = [
    "ACTIVATIONS",
    "ATTENTION_KINDS",
    "CLASSIFIERS",
    "GENERATING",
    "HEADS",
    "PARTS",
    "SUBLAYERS",
    "Adapters",
    "AttentionKind",
    "Classifier",
    "Deltas",
    "FormatRule",
    "Latent",
    "Lexicon",
    "Linformer",
    "ModelConfig",
    "Nystrom",
    "Patches",
    "Rotary",
    "Sets",
    "Sharing",
    "add_head_name",
    "closest",
    "own_heads",
    "reject_unknown",
]
