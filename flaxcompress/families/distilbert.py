"""DistilBERT (Sanh et al. 2019): BERT without segments and pooler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxcompress.config import Classifier, ModelConfig
from flaxcompress.families.base import (
    HF_ACTIVATIONS,
    Family,
    Names,
    activation,
    architecture_of,
    class_count,
    classifier_heads,
    head_of,
    required,
    tied,
    write_classes,
)

_HEADS = {
    "masked_lm": ("DistilBertForMaskedLM",),
    **classifier_heads("DistilBert", "sequence_classification", "token_classification", "span"),
}


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """transformers' DistilBertConfig -> ModelConfig."""
    required(hf, "distilbert", ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim"))
    head = head_of(hf, _HEADS)
    tied(hf, head)
    sequence = head == "sequence_classification"
    return ModelConfig(
        family="distilbert",
        vocabulary=hf["vocab_size"],
        width=hf["dim"],
        layers=hf["n_layers"],
        heads=hf["n_heads"],
        feed_forward_width=hf["hidden_dim"],
        positions=hf.get("max_position_embeddings", 512),
        segments=0,
        activation=activation(hf, "activation"),
        dropout=hf.get("dropout", 0.1),
        attention_dropout=hf.get("attention_dropout", 0.1),
        initializer_range=hf.get("initializer_range", 0.02),
        pad_token=hf.get("pad_token_id") or 0,
        pooler=False,
        head=head,
        head_activation="relu" if sequence else None,
        classifier=Classifier(pooling="first", transform=sequence),
        classes=class_count(hf, head),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return {
        "model_type": "distilbert",
        "architectures": [architecture_of(config, _HEADS, "DistilBertModel")],
        "vocab_size": config.vocabulary,
        "dim": config.width,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "hidden_dim": config.feed_forward_width,
        "max_position_embeddings": config.positions,
        "activation": HF_ACTIVATIONS[config.activation],
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.initializer_range,
        "pad_token_id": config.pad_token,
        **write_classes(config),
    }


def names(config: ModelConfig) -> Names:
    """Where a checkpoint holds every weight."""
    out = Names()
    out.table("embedding/token", "embeddings.word_embeddings")
    out.table("embedding/position", "embeddings.position_embeddings")
    out.norm("embedding/norm", "embeddings.LayerNorm")
    for layer in range(config.layers):
        ours, theirs = f"layers/{layer}", f"transformer.layer.{layer}"
        for projection, short in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "out")):
            out.linear(f"{ours}/attention/{projection}", f"{theirs}.attention.{short}_lin")
        out.linear(f"{ours}/feed_forward/up", f"{theirs}.ffn.lin1")
        out.linear(f"{ours}/feed_forward/down", f"{theirs}.ffn.lin2")
        out.norm(f"{ours}/norms/attention", f"{theirs}.sa_layer_norm")
        out.norm(f"{ours}/norms/feed_forward", f"{theirs}.output_layer_norm")
    if config.head == "masked_lm":
        out.linear("head/transform", "vocab_transform")
        out.norm("head/norm", "vocab_layer_norm")
        out.vector("head/bias", "vocab_projector.bias")
    out.classifier(config, transform="pre_classifier")
    return out


FAMILY = Family(
    model_type="distilbert",
    read_config=read_config,
    write_config=write_config,
    names=names,
    heads=_HEADS,
    ignored=(r"embeddings\.position_ids", r"vocab_projector\.weight"),  # the latter is tied to the token table
    head_prefixes=("vocab_", "pre_classifier.", "classifier.", "qa_outputs."),
)
