"""Llama (Touvron et al. 2023) and its kin: Mistral (Jiang et al. 2023), Qwen2 and Qwen3 (Yang et al. 2024, 2025).

Pre-norm decoders with RMS norms, rotary positions, gated feed-forward and grouped keys and values. They differ in
windows (Mistral; Qwen in its upper layers), biases (Qwen2) and norms of queries and keys (Qwen3).
"""

from __future__ import annotations

import dataclasses
import functools
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
    required,
    write_classes,
    write_padding,
)
from flaxcompress.families.rotary import read_rotary, write_rotary

_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@dataclasses.dataclass(frozen=True)
class Kin:
    """How one of them differs: the prefix of its classes, which maps have biases (None: as the config says), …

    `span_base` is where its class for answer spans keeps the layers.
    """

    model_type: str
    classes: str
    projection_bias: bool | None = None
    output_bias: bool | None = None
    query_key_norm: bool = False
    always_local: bool = False
    positions: int = 2048
    span_base: str = "transformer"

    @property
    def heads(self) -> dict[str, tuple[str, ...]]:
        """{our head: transformers' classes}."""
        more = classifier_heads(self.classes, "sequence_classification", "token_classification", "span")
        return {"causal_lm": (f"{self.classes}ForCausalLM",), **more}


def read_config(hf: Mapping[str, Any], *, kin: Kin) -> ModelConfig:
    """transformers' LlamaConfig, MistralConfig, Qwen2Config or Qwen3Config -> ModelConfig."""
    required(hf, kin.model_type, _REQUIRED)
    heads, layers = hf["num_attention_heads"], hf["num_hidden_layers"]
    stated = bool(hf.get("attention_bias", False))
    head = head_of(hf, kin.heads)
    window, local = _windows(hf, kin, layers)
    return ModelConfig(
        family=kin.model_type,
        vocabulary=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=layers,
        heads=heads,
        key_value_heads=hf.get("num_key_value_heads") or heads,
        head_width=hf.get("head_dim") or hf["hidden_size"] // heads,
        feed_forward_width=hf["intermediate_size"],
        positions=hf.get("max_position_embeddings", kin.positions),
        segments=0,
        activation=activation(hf, "hidden_act", "silu"),
        norm_epsilon=hf.get("rms_norm_eps", 1e-6),
        dropout=0.0,
        attention_dropout=hf.get("attention_dropout") or 0.0,
        initializer_range=hf.get("initializer_range", 0.02),
        pad_token=max(0, hf.get("pad_token_id") or 0),
        pooler=False,
        position_embedding="none",
        embedding_norm=False,
        rotary=read_rotary(hf),
        causal=True,
        window=window,
        local=local,
        gated=True,
        norm="rms",
        norm_place="pre",
        final_norm=True,
        attention_bias=stated if kin.projection_bias is None else kin.projection_bias,
        output_bias=stated if kin.output_bias is None else kin.output_bias,
        feed_forward_bias=bool(hf.get("mlp_bias", False)),
        query_key_norm=kin.query_key_norm,
        head=head,
        classifier=last_token(hf, head),
        classes=class_count(hf, head),
        tied=bool(hf.get("tie_word_embeddings", False)),
    )


def _windows(hf: Mapping[str, Any], kin: Kin, layers: int) -> tuple[int, tuple[bool, ...]]:
    """The largest distance that local layers see, and which they are; a window of n tokens reaches n - 1 back."""
    size = hf.get("sliding_window")
    if not size or not (kin.always_local or hf.get("use_sliding_window", False)):
        return 0, (False,) * layers
    types = hf.get("layer_types")
    if kin.always_local:
        local = (True,) * layers
    elif types is not None:
        local = tuple(t == "sliding_attention" for t in types)
    else:
        local = tuple(i >= hf.get("max_window_layers", 28) for i in range(layers))
    return (size - 1, local) if any(local) else (0, local)


def write_config(config: ModelConfig, *, kin: Kin) -> dict[str, Any]:
    """The inverse of `read_config`."""
    out = {
        "model_type": kin.model_type,
        "architectures": [architecture_of(config, kin.heads, f"{kin.classes}Model")],
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.head_dim,
        "intermediate_size": config.feed_forward_width,
        "max_position_embeddings": config.positions,
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "rms_norm_eps": config.norm_epsilon,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tied,
        **write_padding(config),
        **write_classes(config),
        **write_rotary(config),
    }
    if kin.projection_bias is None or kin.output_bias is None:
        out["attention_bias"] = config.attention_bias
    if kin.model_type == "llama":
        out["mlp_bias"] = config.feed_forward_bias
    if kin.always_local:
        out["sliding_window"] = config.window + 1 if config.window else None
    elif kin.model_type != "llama":
        out["use_sliding_window"] = config.window > 0
        out["sliding_window"] = config.window + 1 if config.window else None
        out["layer_types"] = ["sliding_attention" if local else "full_attention" for local in config.local]
    return out


def names(config: ModelConfig) -> Names:
    """Where a checkpoint holds every weight."""
    out = Names()
    out.table("embedding/token", "embed_tokens")
    for layer in range(config.layers):
        ours, theirs = f"layers/{layer}", f"layers.{layer}"
        for projection, short in (("query", "q"), ("key", "k"), ("value", "v")):
            out.linear(f"{ours}/attention/{projection}", f"{theirs}.self_attn.{short}_proj", bias=config.attention_bias)
            if config.query_key_norm and short != "v":
                out.norm(f"{ours}/attention/{projection}_norm", f"{theirs}.self_attn.{short}_norm", bias=False)
        out.linear(f"{ours}/attention/output", f"{theirs}.self_attn.o_proj", bias=config.output_bias)
        for name in ("gate", "up", "down"):
            out.linear(f"{ours}/feed_forward/{name}", f"{theirs}.mlp.{name}_proj", bias=config.feed_forward_bias)
        out.norm(f"{ours}/norms/attention", f"{theirs}.input_layernorm", bias=False)
        out.norm(f"{ours}/norms/feed_forward", f"{theirs}.post_attention_layernorm", bias=False)
    out.norm("final_norm", "norm", bias=False)
    if config.head == "causal_lm" and not config.tied:
        out.linear("head/output", "lm_head", bias=False)
    out.classifier(config, "" if config.head == "span" else "score")
    return out


def _family(kin: Kin) -> Family:
    return Family(
        model_type=kin.model_type,
        read_config=functools.partial(read_config, kin=kin),
        write_config=functools.partial(write_config, kin=kin),
        names=names,
        heads=kin.heads,
        base="model",
        bases={"span": kin.span_base},
        ignored=(r".*rotary_emb\.inv_freq", r"lm_head\.weight"),  # computed; tied to the token table
        head_prefixes=("score.", "lm_head.", "qa_outputs."),
    )


LLAMA = _family(Kin("llama", "Llama"))
MISTRAL = _family(
    Kin("mistral", "Mistral", projection_bias=False, output_bias=False, always_local=True, span_base="model")
)
QWEN2 = _family(Kin("qwen2", "Qwen2", projection_bias=True, output_bias=False))
QWEN3 = _family(Kin("qwen3", "Qwen3", query_key_norm=True))
