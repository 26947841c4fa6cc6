"""Kinds of self-attention. A new kind is one file with a module and one entry here.

A module takes (config, address) and is called as `Attention` is. Of a config, `cache_arrays` says what the cache keeps
of a token, `stages` in which order linear maps are used, `core_flops` what is computed beside them.
"""

from __future__ import annotations

from typing import Any

from flaxcompress.config import ModelConfig
from flaxcompress.nn.attention import Attention
from flaxcompress.nn.latent_attention import LatentAttention
from flaxcompress.nn.linformer import LinformerAttention
from flaxcompress.nn.nystrom import NystromAttention

KINDS: dict[str, Any] = {
    "full": Attention,
    "latent": LatentAttention,
    "linformer": LinformerAttention,
    "nystrom": NystromAttention,
}


def attention_kind(config: ModelConfig) -> Any:
    """The module of the config's kind of attention."""
    return KINDS["full" if config.attention is None else config.attention.kind]
