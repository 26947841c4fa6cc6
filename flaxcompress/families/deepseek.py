"""DeepSeek-V2 and -V3 (2024) with dense feed-forward: pre-norm decoders like Llama, but with latent attention.

Only models without experts are read: most released checkpoints have experts in all but their first layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from flaxcompress.config import Latent, ModelConfig
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
from flaxcompress.families.rotary import read_rotary, stated_rotary, write_rotary, yarn_scale

_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@dataclasses.dataclass(frozen=True)
class Kin:
    """How the two differ: what transformers takes for granted where config.json says nothing, …"""

    model_type: str
    classes: str
    positions: int
    experts: int
    dense_layers: int
    feed_forward_bias: bool  # whether mlp_bias is heeded
    classifiers: tuple[str, ...] = ("sequence_classification",)

    @property
    def heads(self) -> dict[str, tuple[str, ...]]:
        """{our head: transformers' classes}."""
        return {"causal_lm": (f"{self.classes}ForCausalLM",), **classifier_heads(self.classes, *self.classifiers)}


def _refuse_experts(hf: Mapping[str, Any], kin: Kin) -> None:
    experts, layers = hf.get("n_routed_experts", kin.experts), hf["num_hidden_layers"]
    first = hf.get("first_k_dense_replace", kin.dense_layers) or 0
    if experts and first < layers:
        raise ValueError(
            f"config.json: layers {first} … {layers - 1} have {experts} routed experts (first_k_dense_replace {first}, "
            f"n_routed_experts {experts}); of {kin.model_type} only models with dense feed-forward in every layer are "
            "supported"
        )


def read_config(hf: Mapping[str, Any], *, kin: Kin) -> ModelConfig:
    """transformers' DeepseekV2Config or DeepseekV3Config -> ModelConfig. Raises ValueError for experts."""
    required(hf, kin.model_type, _REQUIRED)
    _refuse_experts(hf, kin)
    heads, head = hf["num_attention_heads"], head_of(hf, kin.heads)
    if (groups := hf.get("num_key_value_heads") or heads) != heads:
        raise ValueError(f"config.json: num_key_value_heads {groups} is not supported, only as many as heads, {heads}")
    biased = bool(hf.get("attention_bias", False))
    attention = Latent(
        query_rank=hf.get("q_lora_rank", 1536),
        key_value_rank=hf.get("kv_lora_rank", 512),
        rotary_width=hf.get("qk_rope_head_dim", 64),
        plain_width=hf.get("qk_nope_head_dim", 128),
        value_width=hf.get("v_head_dim", 128),
        interleaved=kin.model_type == "deepseek_v2" or bool(hf.get("rope_interleave", True)),
    )
    return ModelConfig(
        family=kin.model_type,
        vocabulary=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        head_width=attention.value_width,
        attention=attention,
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
        attention_scale=_attention_scale(hf, attention),
        causal=True,
        gated=True,
        norm="rms",
        norm_place="pre",
        final_norm=True,
        attention_bias=biased,
        output_bias=biased,
        feed_forward_bias=kin.feed_forward_bias and bool(hf.get("mlp_bias", False)),
        head=head,
        classifier=last_token(hf, head),
        classes=class_count(hf, head),
        tied=bool(hf.get("tie_word_embeddings", False)),
    )


def _attention_scale(hf: Mapping[str, Any], kind: Latent) -> float | None:
    """1/√d, sharpened for longer text where rotary positions are scaled; None for 1/√d alone."""
    stated = stated_rotary(hf)
    scaled = (stated.get("rope_type") or stated.get("type") or "default") != "default"
    weight = stated.get("mscale_all_dim") if scaled else None
    if not weight:
        return None
    return _plain_scale(kind) * yarn_scale(float(stated["factor"]), weight) ** 2


def _plain_scale(kind: Latent) -> float:
    return (kind.plain_width + kind.rotary_width) ** -0.5


def _write_rotary(config: ModelConfig, kind: Latent) -> dict[str, Any]:
    """The inverse of `read_rotary` and `_attention_scale`."""
    out = write_rotary(config)
    if (scale := config.attention_scale) is None:
        return out
    factor = config.rotary.factor if config.rotary is not None and config.rotary.scaling != "none" else 1.0
    if factor <= 1:
        raise ValueError(f"export: DeepSeek's attention_scale follows its rotary scaling, {scale} cannot be written")
    weight = (math.sqrt(scale / _plain_scale(kind)) - 1) / (0.1 * math.log(factor))
    return {"rope_parameters": {**out["rope_parameters"], "mscale_all_dim": weight}}


def write_config(config: ModelConfig, *, kin: Kin) -> dict[str, Any]:
    """The inverse of `read_config`. Raises ValueError for another kind of attention."""
    kind = config.attention
    if not isinstance(kind, Latent):
        raise ValueError(f"export: a {kin.model_type} model has latent attention, got {kind}")
    out = {
        "model_type": kin.model_type,
        "architectures": [architecture_of(config, kin.heads, f"{kin.classes}Model")],
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "first_k_dense_replace": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "q_lora_rank": kind.query_rank,
        "kv_lora_rank": kind.key_value_rank,
        "qk_rope_head_dim": kind.rotary_width,
        "qk_nope_head_dim": kind.plain_width,
        "v_head_dim": kind.value_width,
        "intermediate_size": config.feed_forward_width,
        "max_position_embeddings": config.positions,
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "rms_norm_eps": config.norm_epsilon,
        "attention_bias": config.attention_bias,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tied,
        **write_padding(config),
        **write_classes(config),
        **_write_rotary(config, kind),
    }
    out["mlp_bias" if kin.feed_forward_bias else "rope_interleave"] = (
        config.feed_forward_bias if kin.feed_forward_bias else kind.interleaved
    )
    return out


def names(config: ModelConfig) -> Names:
    """Where a checkpoint holds every weight."""
    out = Names()
    out.table("embedding/token", "embed_tokens")
    for layer in range(config.layers):
        ours, theirs = f"layers/{layer}", f"layers.{layer}"
        attention, stored = f"{ours}/attention", f"{theirs}.self_attn"
        if isinstance(config.attention, Latent) and config.attention.query_rank is not None:
            out.linear(f"{attention}/query_latent", f"{stored}.q_a_proj", bias=config.attention_bias)
            out.norm(f"{attention}/query_norm", f"{stored}.q_a_layernorm", bias=False)
            out.linear(f"{attention}/query", f"{stored}.q_b_proj", bias=False)
        else:
            out.linear(f"{attention}/query", f"{stored}.q_proj", bias=False)
        out.linear(f"{attention}/latent", f"{stored}.kv_a_proj_with_mqa", bias=config.attention_bias)
        out.norm(f"{attention}/latent_norm", f"{stored}.kv_a_layernorm", bias=False)
        out.linear(f"{attention}/expand", f"{stored}.kv_b_proj", bias=False)
        out.linear(f"{attention}/output", f"{stored}.o_proj", bias=config.output_bias)
        for name in ("gate", "up", "down"):
            out.linear(f"{ours}/feed_forward/{name}", f"{theirs}.mlp.{name}_proj", bias=config.feed_forward_bias)
        out.norm(f"{ours}/norms/attention", f"{theirs}.input_layernorm", bias=False)
        out.norm(f"{ours}/norms/feed_forward", f"{theirs}.post_attention_layernorm", bias=False)
    out.norm("final_norm", "norm", bias=False)
    if config.head == "causal_lm" and not config.tied:
        out.linear("head/output", "lm_head", bias=False)
    out.classifier(config, "score")
    return out


def _family(kin: Kin) -> Family:
    return Family(
        model_type=kin.model_type,
        read_config=functools.partial(read_config, kin=kin),
        write_config=functools.partial(write_config, kin=kin),
        names=names,
        heads=kin.heads,
        base="model",
        ignored=(r".*rotary_emb\.inv_freq", r"lm_head\.weight"),  # computed; tied to the token table
        head_prefixes=("score.", "lm_head."),
    )


V2 = _family(Kin("deepseek_v2", "DeepseekV2", 2048, experts=64, dense_layers=0, feed_forward_bias=True))
V3 = _family(
    Kin(
        "deepseek_v3",
        "DeepseekV3",
        4096,
        experts=256,
        dense_layers=3,
        feed_forward_bias=False,
        classifiers=("sequence_classification", "token_classification"),
    )
)
