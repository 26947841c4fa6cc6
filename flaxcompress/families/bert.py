"""BERT (Devlin et al. 2019), as in transformers' BertModel and BertForMaskedLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxcompress.config import ModelConfig
from flaxcompress.families.base import Family

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_HF_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu"}
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_MASKED_LM = ("BertForMaskedLM", "BertForPreTraining")


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """transformers' BertConfig -> ModelConfig; an MLM head when the architecture names one."""
    missing = [name for name in _REQUIRED if name not in hf]
    if missing:
        raise ValueError(f"config.json: a bert config needs {', '.join(missing)}")
    positions = hf.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise ValueError(f"config.json: position_embedding_type {positions!r} is not supported, only 'absolute'")
    if hf.get("is_decoder") or hf.get("add_cross_attention"):
        raise ValueError("config.json: BERT as a decoder is not supported")
    activation = hf.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act {activation!r} is not supported; known: {', '.join(_ACTIVATIONS)}")
    architectures = hf.get("architectures") or []
    if not hf.get("tie_word_embeddings", True) and any(a in _MASKED_LM for a in architectures):
        raise ValueError(
            "config.json: tie_word_embeddings is false, but only a head tied to the token table is supported; "
            'load it without: head="none"'
        )
    return ModelConfig(
        family="bert",
        vocabulary=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        feed_forward_width=hf["intermediate_size"],
        positions=hf.get("max_position_embeddings", 512),
        segments=hf.get("type_vocab_size", 2),
        activation=_ACTIVATIONS[activation],
        norm_epsilon=hf.get("layer_norm_eps", 1e-12),
        dropout=hf.get("hidden_dropout_prob", 0.1),
        attention_dropout=hf.get("attention_probs_dropout_prob", 0.1),
        initializer_range=hf.get("initializer_range", 0.02),
        pad_token=hf.get("pad_token_id") or 0,
        head="masked_lm" if any(a in _MASKED_LM for a in architectures) else "none",
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> transformers' BertConfig, as JSON."""
    return {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM" if config.head == "masked_lm" else "BertModel"],
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.feed_forward_width,
        "max_position_embeddings": config.positions,
        "type_vocab_size": max(1, config.segments),  # stock BERT cannot do without
        "hidden_act": _HF_ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_epsilon,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": config.initializer_range,
        "pad_token_id": config.pad_token,
        "position_embedding_type": "absolute",
    }


def names(config: ModelConfig) -> dict[str, tuple[str, bool]]:
    """{address: (tensor name without prefix, stored transposed)}; one entry per layer, sharing not considered."""
    out: dict[str, tuple[str, bool]] = {
        "embedding/token": ("embeddings.word_embeddings.weight", False),
        "embedding/position": ("embeddings.position_embeddings.weight", False),
    }
    if config.segments:
        out["embedding/segment"] = ("embeddings.token_type_embeddings.weight", False)

    def linear(address: str, name: str) -> None:
        out[f"{address}/kernel"] = (f"{name}.weight", True)
        out[f"{address}/bias"] = (f"{name}.bias", False)

    def norm(address: str, name: str) -> None:
        out[f"{address}/scale"] = (f"{name}.weight", False)
        out[f"{address}/bias"] = (f"{name}.bias", False)

    norm("embedding/norm", "embeddings.LayerNorm")
    for layer in range(config.layers):
        ours, theirs = f"layers/{layer}", f"encoder.layer.{layer}"
        for projection in ("query", "key", "value"):
            linear(f"{ours}/attention/{projection}", f"{theirs}.attention.self.{projection}")
        linear(f"{ours}/attention/output", f"{theirs}.attention.output.dense")
        linear(f"{ours}/feed_forward/up", f"{theirs}.intermediate.dense")
        linear(f"{ours}/feed_forward/down", f"{theirs}.output.dense")
        norm(f"{ours}/norms/attention", f"{theirs}.attention.output.LayerNorm")
        norm(f"{ours}/norms/feed_forward", f"{theirs}.output.LayerNorm")
    if config.pooler:
        linear("pooler/dense", "pooler.dense")
    if config.head == "masked_lm":
        linear("head/transform", "cls.predictions.transform.dense")
        norm("head/norm", "cls.predictions.transform.LayerNorm")
        out["head/bias"] = ("cls.predictions.bias", False)
    return out


FAMILY = Family(
    model_type="bert",
    read_config=read_config,
    write_config=write_config,
    names=names,
    prefixes=("module.", "model.", "bert."),
    renames=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    ignored=(
        r"embeddings\.position_ids",
        r"embeddings\.token_type_ids",
        r"cls\.predictions\.decoder\.(weight|bias)",  # tied to the token table and to cls.predictions.bias
    ),
    head_prefixes=("cls.", "classifier.", "qa_outputs.", "pooler."),
)
