"""Kinds of self-attention. A new kind is one file with a module and one entry here.

A module takes (config, address) and is called as `Attention` is; `cache_arrays(config)` says what it keeps of a token.
"""

from __future__ import annotations

from typing import Any

from flaxcompress.config import ModelConfig
from flaxcompress.nn.attention import Attention

KINDS: dict[str, Any] = {"full": Attention}


def attention_kind(config: ModelConfig) -> Any:
    """The module of the config's kind of attention."""
    return KINDS["full"]
