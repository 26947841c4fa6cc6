"""ViT (Dosovitskiy et al. 2021): patches of an image as tokens of a pre-norm encoder, a class token in front."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxcompress.config import ModelConfig, Patches
from flaxcompress.families.base import (
    HF_ACTIVATIONS,
    Family,
    Names,
    Stored,
    activation,
    class_count,
    head_of,
    refuse,
    required,
    write_classes,
)

_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_HEADS = {"sequence_classification": ("ViTForImageClassification",)}


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """transformers' ViTConfig -> ModelConfig."""
    required(hf, "vit", _REQUIRED)
    refuse(hf, "pooler_act", "tanh")
    refuse(hf, "pooler_output_size", hf["hidden_size"])
    height, width = _pair(hf.get("image_size", 224))
    size = _pair(hf.get("patch_size", 16))
    if size[0] != size[1]:
        raise ValueError(f"config.json: patch_size {list(size)} is not supported, only squares")
    head = head_of(hf, _HEADS)
    patches = Patches(height=height, width=width, size=size[0], channels=hf.get("num_channels", 3))
    biased = bool(hf.get("qkv_bias", True))
    return ModelConfig(
        family="vit",
        vocabulary=0,
        patches=patches,
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        feed_forward_width=hf["intermediate_size"],
        positions=1 + patches.count,
        segments=0,
        activation=activation(hf, "hidden_act"),
        norm_epsilon=hf.get("layer_norm_eps", 1e-12),
        dropout=hf.get("hidden_dropout_prob", 0.0),
        attention_dropout=hf.get("attention_probs_dropout_prob", 0.0),
        initializer_range=hf.get("initializer_range", 0.02),
        attention_bias=biased,
        norm_place="pre",
        final_norm=True,
        pooler=head == "none",
        head=head,
        classes=class_count(hf, head),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    assert config.patches is not None
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification" if config.classes else "ViTModel"],
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.feed_forward_width,
        "image_size": [config.patches.height, config.patches.width],
        "patch_size": config.patches.size,
        "num_channels": config.patches.channels,
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_epsilon,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": config.initializer_range,
        "qkv_bias": config.attention_bias,
        "pooler_output_size": config.width,
        **write_classes(config),
    }


def names(config: ModelConfig) -> Names:
    """Where a checkpoint holds every weight."""
    assert config.patches is not None
    out, width, patches = Names(), config.width, config.patches
    out["embedding/first"] = Stored("embeddings.cls_token", folded=((1, 1, width), (width,)))
    rows = 1 + patches.count
    out["embedding/position"] = Stored("embeddings.position_embeddings", folded=((1, rows, width), (rows, width)))
    kernel = (width, patches.channels, patches.size, patches.size)
    out.linear("embedding/patch", "embeddings.patch_embeddings.projection")
    folded = (kernel, (width, patches.channels * patches.size**2))
    out["embedding/patch/kernel"] = out["embedding/patch/kernel"]._replace(folded=folded)
    for layer in range(config.layers):
        ours, theirs = f"layers/{layer}", f"encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            out.linear(f"{ours}/attention/{name}", f"{theirs}.attention.attention.{name}", bias=config.attention_bias)
        out.linear(f"{ours}/attention/output", f"{theirs}.attention.output.dense")
        out.linear(f"{ours}/feed_forward/up", f"{theirs}.intermediate.dense")
        out.linear(f"{ours}/feed_forward/down", f"{theirs}.output.dense")
        out.norm(f"{ours}/norms/attention", f"{theirs}.layernorm_before")
        out.norm(f"{ours}/norms/feed_forward", f"{theirs}.layernorm_after")
    out.norm("final_norm", "layernorm")
    if config.pooler:
        out.linear("pooler/dense", "pooler.dense")
    out.classifier(config)
    return out


FAMILY = Family(
    model_type="vit",
    read_config=read_config,
    write_config=write_config,
    names=names,
    heads=_HEADS,
    ignored=(r"embeddings\.mask_token",),  # of pre-training by masked patches
    head_prefixes=("classifier.", "decoder.", "pooler."),
)
