"""ModernBERT (Warner et al. 2024): rotary positions, local and global layers by turns, gated, pre-norm, no biases."""

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
from flaxcompress.families.rotary import read_alternating, write_alternating

_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_HEADS = {
    "masked_lm": ("ModernBertForMaskedLM",),
    **classifier_heads("ModernBert", "sequence_classification", "token_classification", "span"),
}
_POOLINGS = {"cls": "first", "mean": "mean"}


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """transformers' ModernBertConfig -> ModelConfig."""
    required(hf, "modernbert", _REQUIRED)
    head, layers = head_of(hf, _HEADS), hf["num_hidden_layers"]
    tied(hf, head)
    types = hf.get("layer_types")
    if types is None:
        every = hf.get("global_attn_every_n_layers", 3)
        types = ["sliding_attention" if i % every else "full_attention" for i in range(layers)]
    local = tuple(t == "sliding_attention" for t in types)
    if head == "masked_lm" and not hf.get("decoder_bias", True):
        raise ValueError("config.json: decoder_bias false is not supported; load it without the head: head='none'")
    if (pooling := hf.get("classifier_pooling", "cls")) not in _POOLINGS:
        raise ValueError(f"config.json: classifier_pooling {pooling!r} is not supported; known: {', '.join(_POOLINGS)}")
    return ModelConfig(
        family="modernbert",
        vocabulary=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=layers,
        heads=hf["num_attention_heads"],
        feed_forward_width=hf["intermediate_size"],
        positions=hf.get("max_position_embeddings", 8192),
        segments=0,
        activation=activation(hf, "hidden_activation"),
        norm_epsilon=hf.get("norm_eps", 1e-5),
        norm_bias=bool(hf.get("norm_bias", False)),
        dropout=max(hf.get("embedding_dropout", 0.0), hf.get("mlp_dropout", 0.0)),
        attention_dropout=hf.get("attention_dropout", 0.0),
        initializer_range=hf.get("initializer_range", 0.02),
        pad_token=hf.get("pad_token_id") or 0,
        pooler=False,
        position_embedding="none",
        rotary=read_alternating(hf, 160_000.0, 10_000.0),
        window=hf.get("local_attention", 128) // 2 if any(local) else 0,
        local=local,
        gated=True,
        norm_place="pre",
        first_norm=False,
        final_norm=True,
        attention_bias=bool(hf.get("attention_bias", False)),
        output_bias=bool(hf.get("attention_bias", False)),
        feed_forward_bias=bool(hf.get("mlp_bias", False)),
        head=head,
        head_activation=activation(hf, "classifier_activation"),
        head_bias=bool(hf.get("classifier_bias", False)),
        classifier=Classifier(pooling=_POOLINGS[pooling], transform=True, norm=True),
        classes=class_count(hf, head),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    assert config.rotary is not None
    return {
        "model_type": "modernbert",
        "architectures": [architecture_of(config, _HEADS, "ModernBertModel")],
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.feed_forward_width,
        "max_position_embeddings": config.positions,
        "hidden_activation": HF_ACTIVATIONS[config.activation],
        "classifier_activation": HF_ACTIVATIONS[config.head_activation or config.activation],
        "classifier_bias": config.head_bias,
        "classifier_pooling": "mean" if config.classifier.pooling == "mean" else "cls",
        "norm_eps": config.norm_epsilon,
        "norm_bias": config.norm_bias,
        "embedding_dropout": config.dropout,
        "mlp_dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.feed_forward_bias,
        "decoder_bias": True,
        "initializer_range": config.initializer_range,
        "pad_token_id": config.pad_token,
        "local_attention": 2 * config.window,
        "layer_types": ["sliding_attention" if local else "full_attention" for local in config.local],
        **write_alternating(config.rotary),
        **write_classes(config),
        # Ids that stock code wants within the vocabulary, though the network does not read them.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), config.pad_token),
    }


def names(config: ModelConfig) -> Names:
    """Where a checkpoint holds every weight."""
    out, bias = Names(), config.norm_bias
    out.table("embedding/token", "embeddings.tok_embeddings")
    out.norm("embedding/norm", "embeddings.norm", bias=bias)
    for layer in range(config.layers):
        ours, theirs = f"layers/{layer}", f"layers.{layer}"
        for i, name in enumerate(("query", "key", "value")):
            out.linear(f"{ours}/attention/{name}", f"{theirs}.attn.Wqkv", bias=config.attention_bias, part=(i, 3))
        out.linear(f"{ours}/attention/output", f"{theirs}.attn.Wo", bias=config.output_bias)
        for i, name in enumerate(("gate", "up")):
            out.linear(f"{ours}/feed_forward/{name}", f"{theirs}.mlp.Wi", bias=config.feed_forward_bias, part=(i, 2))
        out.linear(f"{ours}/feed_forward/down", f"{theirs}.mlp.Wo", bias=config.feed_forward_bias)
        if layer:
            out.norm(f"{ours}/norms/attention", f"{theirs}.attn_norm", bias=bias)
        out.norm(f"{ours}/norms/feed_forward", f"{theirs}.mlp_norm", bias=bias)
    out.norm("final_norm", "final_norm", bias=bias)
    if config.head == "masked_lm":
        out.linear("head/transform", "head.dense", bias=config.head_bias)
        out.norm("head/norm", "head.norm", bias=bias)
        out.vector("head/bias", "decoder.bias")
    out.classifier(config, "classifier", transform="head.dense", norm="head.norm")
    return out


FAMILY = Family(
    model_type="modernbert",
    read_config=read_config,
    write_config=write_config,
    names=names,
    heads=_HEADS,
    base="model",
    ignored=(r"decoder\.weight", r".*inv_freq"),  # tied to the token table; computed
    head_prefixes=("head.", "decoder.", "classifier."),
)
