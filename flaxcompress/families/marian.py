"""Marian (Junczys-Dowmunt et al. 2018), OPUS-MT's translators: an encoder and a decoder, sinusoidal positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flaxcompress.config import ModelConfig, Sharing
from flaxcompress.families.base import HF_ACTIVATIONS, Family, Names, Stored, activation, head_of, refuse, required

_HEADS = {"seq2seq_lm": ("MarianMTModel",)}
_REQUIRED = ("vocab_size", "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads")


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """transformers' MarianConfig -> ModelConfig."""
    required(hf, "marian", (*_REQUIRED, "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim"))
    refuse(hf, "share_encoder_decoder_embeddings", True)
    refuse(hf, "tie_word_embeddings", True)
    refuse(hf, "static_position_embeddings", True)
    refuse(hf, "normalize_before", False)
    if hf.get("decoder_vocab_size") not in (None, hf["vocab_size"]):
        raise ValueError("config.json: decoder_vocab_size other than vocab_size is not supported")
    same: dict[str, Any] = {
        "family": "marian",
        "width": hf["d_model"],
        "positions": hf.get("max_position_embeddings", 1024),
        "position_embedding": "sinusoidal",
        "segments": 0,
        "activation": activation(hf, "activation_function"),
        "norm_epsilon": 1e-5,
        "embedding_norm": False,
        "embedding_scale": math.sqrt(hf["d_model"]) if hf.get("scale_embedding", False) else 1.0,
        "dropout": hf.get("dropout", 0.1),
        "attention_dropout": hf.get("attention_dropout", 0.0),
        "initializer_range": hf.get("init_std", 0.02),
        "pad_token": hf.get("pad_token_id") or 0,
        "pooler": False,
    }
    decoder = ModelConfig(
        **same,
        vocabulary=0,
        layers=hf["decoder_layers"],
        heads=hf["decoder_attention_heads"],
        feed_forward_width=hf["decoder_ffn_dim"],
        causal=True,
        sharing=Sharing.own(hf["decoder_layers"], cross_attention=True),
    )
    head = head_of(hf, _HEADS)
    return ModelConfig(
        **same,
        vocabulary=hf["vocab_size"],
        layers=hf["encoder_layers"],
        heads=hf["encoder_attention_heads"],
        feed_forward_width=hf["encoder_ffn_dim"],
        decoder=decoder,
        head=head,
        logit_bias=head == "seq2seq_lm",
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    decoder = config.decoder
    if decoder is None:
        raise ValueError("export: Marian's format has a decoder; this model has none")
    return {
        "model_type": "marian",
        "architectures": [_HEADS[config.head][0] if config.head in _HEADS else "MarianModel"],
        "vocab_size": config.vocabulary,
        "decoder_vocab_size": config.vocabulary,
        "d_model": config.width,
        "encoder_layers": config.layers,
        "encoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.feed_forward_width,
        "decoder_layers": decoder.layers,
        "decoder_attention_heads": decoder.heads,
        "decoder_ffn_dim": decoder.feed_forward_width,
        "max_position_embeddings": config.positions,
        "activation_function": HF_ACTIVATIONS[config.activation],
        "scale_embedding": config.embedding_scale != 1.0,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "init_std": config.initializer_range,
        "pad_token_id": config.pad_token,
        "decoder_start_token_id": config.pad_token,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
    }


def _stack_names(out: Names, config: ModelConfig, ours: str, theirs: str) -> None:
    short = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
    parts = {"attention": "self_attn", "cross_attention": "encoder_attn"}
    for layer in range(config.layers):
        at, block = f"{ours}layers/{layer}", f"{theirs}.layers.{layer}"
        for part, name in parts.items():
            if getattr(config.sharing, part):
                for projection in short:
                    out.linear(f"{at}/{part}/{projection}", f"{block}.{name}.{short[projection]}")
                out.norm(f"{at}/norms/{part}", f"{block}.{name}_layer_norm")
        out.linear(f"{at}/feed_forward/up", f"{block}.fc1")
        out.linear(f"{at}/feed_forward/down", f"{block}.fc2")
        out.norm(f"{at}/norms/feed_forward", f"{block}.final_layer_norm")


def names(config: ModelConfig) -> Names:
    """Where a checkpoint holds every weight."""
    out = Names()
    out.table("embedding/token", "shared")
    _stack_names(out, config, "", "encoder")
    if config.decoder is not None:
        _stack_names(out, config.decoder, "decoder/", "decoder")
    if config.logit_bias:
        out["head/bias"] = Stored("final_logits_bias", folded=((1, config.vocabulary), (config.vocabulary,)))
    return out


FAMILY = Family(
    model_type="marian",
    read_config=read_config,
    write_config=write_config,
    names=names,
    heads=_HEADS,
    base="model",
    ignored=(
        r"(en|de)coder\.embed_tokens\.weight",  # copies of the token table
        r"(en|de)coder\.embed_positions\.weight",  # computed
        r"lm_head\.weight",
    ),
    head_prefixes=("final_logits_bias", "lm_head."),
)
