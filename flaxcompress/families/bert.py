"""BERT (Devlin et al. 2019), as in transformers' BertModel and BertForMaskedLM; what its descendants have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxcompress.config import ModelConfig
from flaxcompress.families.base import (
    HF_ACTIVATIONS,
    Family,
    Names,
    absolute_positions,
    activation,
    architecture_of,
    class_count,
    classifier_heads,
    head_of,
    required,
    tied,
    write_classes,
)

REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
RENAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
IGNORED = (r"embeddings\.position_ids", r"embeddings\.token_type_ids")
_HEADS = {
    "masked_lm": ("BertForMaskedLM",),
    "pretraining": ("BertForPreTraining",),
    **classifier_heads("Bert", "sequence_classification", "token_classification", "span"),
}


def read_encoder(hf: Mapping[str, Any], family: str, **more: Any) -> ModelConfig:
    """The keys that BERT's config shares with its descendants', and `more` fields."""
    required(hf, family, REQUIRED)
    absolute_positions(hf)
    if hf.get("is_decoder") or hf.get("add_cross_attention"):
        raise ValueError(f"config.json: {family} as a decoder is not supported")
    fields: dict[str, Any] = {
        "vocabulary": hf["vocab_size"],
        "width": hf["hidden_size"],
        "layers": hf["num_hidden_layers"],
        "heads": hf["num_attention_heads"],
        "feed_forward_width": hf["intermediate_size"],
        "positions": hf.get("max_position_embeddings", 512),
        "segments": hf.get("type_vocab_size", 2),
        "activation": activation(hf, "hidden_act"),
        "norm_epsilon": hf.get("layer_norm_eps", 1e-12),
        "dropout": hf.get("hidden_dropout_prob", 0.1),
        "attention_dropout": hf.get("attention_probs_dropout_prob", 0.1),
        "initializer_range": hf.get("initializer_range", 0.02),
        "pad_token": hf.get("pad_token_id") or 0,
    }
    fields["classes"] = class_count(hf, more.get("head", "none"))
    return ModelConfig(family=family, **{**fields, **more})


def write_encoder(config: ModelConfig, model_type: str, architecture: str, **more: Any) -> dict[str, Any]:
    """The inverse of `read_encoder`."""
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.feed_forward_width,
        "max_position_embeddings": config.positions + config.position_offset,
        "type_vocab_size": max(1, config.segments),  # stock code cannot do without
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_epsilon,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": config.initializer_range,
        "pad_token_id": config.pad_token,
        **write_classes(config),
        **more,
    }


def encoder_names(config: ModelConfig) -> Names:
    """Embeddings and layers as BERT names them."""
    out = Names()
    out.table("embedding/token", "embeddings.word_embeddings")
    out.table("embedding/position", "embeddings.position_embeddings")
    if config.segments:
        out.table("embedding/segment", "embeddings.token_type_embeddings")
    out.norm("embedding/norm", "embeddings.LayerNorm")
    for layer in range(config.layers):
        ours, theirs = f"layers/{layer}", f"encoder.layer.{layer}"
        for projection in ("query", "key", "value"):
            out.linear(f"{ours}/attention/{projection}", f"{theirs}.attention.self.{projection}")
        out.linear(f"{ours}/attention/output", f"{theirs}.attention.output.dense")
        out.linear(f"{ours}/feed_forward/up", f"{theirs}.intermediate.dense")
        out.linear(f"{ours}/feed_forward/down", f"{theirs}.output.dense")
        out.norm(f"{ours}/norms/attention", f"{theirs}.attention.output.LayerNorm")
        out.norm(f"{ours}/norms/feed_forward", f"{theirs}.output.LayerNorm")
    if config.pooler:
        out.linear("pooler/dense", "pooler.dense")
    return out


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """transformers' BertConfig -> ModelConfig; an MLM head when the architecture names one."""
    head = head_of(hf, _HEADS)
    tied(hf, head)
    more = {"classes": 2} if head == "pretraining" else {}
    return read_encoder(hf, "bert", head=head, pooler=head not in ("token_classification", "span"), **more)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> transformers' BertConfig, as JSON."""
    architecture = architecture_of(config, _HEADS, "BertModel")
    return write_encoder(config, "bert", architecture, position_embedding_type="absolute")


def names(config: ModelConfig) -> Names:
    """Where a checkpoint holds every weight."""
    out = encoder_names(config)
    if config.head in ("masked_lm", "pretraining"):
        out.linear("head/transform", "cls.predictions.transform.dense")
        out.norm("head/norm", "cls.predictions.transform.LayerNorm")
        out.vector("head/bias", "cls.predictions.bias")
    if config.head == "pretraining":
        out.linear("head/order", "cls.seq_relationship")
    out.classifier(config)
    return out


FAMILY = Family(
    model_type="bert",
    read_config=read_config,
    write_config=write_config,
    names=names,
    heads=_HEADS,
    renames=RENAMES,
    ignored=(*IGNORED, r"cls\.predictions\.decoder\.(weight|bias)"),  # tied to the token table and cls.predictions.bias
    head_prefixes=("cls.", "classifier.", "qa_outputs.", "pooler."),
)
