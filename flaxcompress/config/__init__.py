"""ModelConfig and its parts: frozen, validated on construction, JSON both ways."""

from flaxcompress.config.attention import ATTENTION_KINDS, AttentionKind, Latent, Linformer, Nystrom
from flaxcompress.config.format_rule import FormatRule
from flaxcompress.config.model import ACTIVATIONS, CLASSIFIERS, HEADS, ModelConfig
from flaxcompress.config.names import closest, reject_unknown
from flaxcompress.config.patches import Patches
from flaxcompress.config.rotary import Rotary
from flaxcompress.config.sharing import PARTS, Sets, Sharing

__all__ = [
    "ACTIVATIONS",
    "ATTENTION_KINDS",
    "CLASSIFIERS",
    "HEADS",
    "PARTS",
    "AttentionKind",
    "FormatRule",
    "Latent",
    "Linformer",
    "ModelConfig",
    "Nystrom",
    "Patches",
    "Rotary",
    "Sets",
    "Sharing",
    "closest",
    "reject_unknown",
]
