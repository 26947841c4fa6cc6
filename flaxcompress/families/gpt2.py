"""GPT-2 (Radford et al. 2019): a pre-norm decoder with learned positions; kernels stored [n, m], q, k and v in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxcompress.config import ModelConfig
from flaxcompress.families.base import (
    HF_ACTIVATIONS,
    Family,
    Names,
    activation,
    architecture_of,
    class_count,
    classifier_heads,
    head_of,
    last_token,
    refuse,
    required,
    write_classes,
    write_padding,
)

_HEADS = {
    "causal_lm": ("GPT2LMHeadModel",),
    **classifier_heads("GPT2", "sequence_classification", "token_classification", "span"),
}


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """transformers' GPT2Config -> ModelConfig."""
    required(hf, "gpt2", ("vocab_size", "n_embd", "n_layer", "n_head"))
    for key, only in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        refuse(hf, key, only)
    head = head_of(hf, _HEADS)
    dropouts = {hf.get(key, 0.1) for key in ("resid_pdrop", "embd_pdrop")}
    return ModelConfig(
        family="gpt2",
        vocabulary=hf["vocab_size"],
        width=hf["n_embd"],
        layers=hf["n_layer"],
        heads=hf["n_head"],
        feed_forward_width=hf.get("n_inner") or 4 * hf["n_embd"],
        positions=hf.get("n_positions", 1024),
        segments=0,
        activation=activation(hf, "activation_function", "gelu_new"),
        norm_epsilon=hf.get("layer_norm_epsilon", 1e-5),
        dropout=max(dropouts),
        attention_dropout=hf.get("attn_pdrop", 0.1),
        initializer_range=hf.get("initializer_range", 0.02),
        pad_token=hf.get("pad_token_id") or 0,
        pooler=False,
        embedding_norm=False,
        causal=True,
        norm_place="pre",
        final_norm=True,
        head=head,
        classifier=last_token(hf, head),
        classes=class_count(hf, head),
        tied=bool(hf.get("tie_word_embeddings", True)),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return {
        "model_type": "gpt2",
        "architectures": [architecture_of(config, _HEADS, "GPT2Model")],
        "vocab_size": config.vocabulary,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.feed_forward_width,
        "n_positions": config.positions,
        "activation_function": HF_ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.norm_epsilon,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tied,
        **write_padding(config),
        **write_classes(config),
    }


def names(config: ModelConfig) -> Names:
    """Where a checkpoint holds every weight."""
    out = Names()
    out.table("embedding/token", "wte")
    out.table("embedding/position", "wpe")
    for layer in range(config.layers):
        ours, theirs = f"layers/{layer}", f"h.{layer}"
        for i, projection in enumerate(("query", "key", "value")):
            out.linear(f"{ours}/attention/{projection}", f"{theirs}.attn.c_attn", transposed=False, part=(i, 3))
        out.linear(f"{ours}/attention/output", f"{theirs}.attn.c_proj", transposed=False)
        out.linear(f"{ours}/feed_forward/up", f"{theirs}.mlp.c_fc", transposed=False)
        out.linear(f"{ours}/feed_forward/down", f"{theirs}.mlp.c_proj", transposed=False)
        out.norm(f"{ours}/norms/attention", f"{theirs}.ln_1")
        out.norm(f"{ours}/norms/feed_forward", f"{theirs}.ln_2")
    out.norm("final_norm", "ln_f")
    if config.head == "causal_lm" and not config.tied:
        out.linear("head/output", "lm_head", bias=False)
    out.classifier(config, "score" if config.head == "sequence_classification" else "")
    return out


FAMILY = Family(
    model_type="gpt2",
    read_config=read_config,
    write_config=write_config,
    names=names,
    heads=_HEADS,
    base="transformer",
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias)", r"lm_head\.weight"),  # a causal mask; tied to the token table
    head_prefixes=("score.", "classifier.", "qa_outputs.", "lm_head.", "multiple_choice_head."),
)
