"""ALBERT (Lan et al. 2020): narrow embeddings and layers that share their weights in groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxcompress.config import ModelConfig, Sharing
from flaxcompress.families.base import Family, Names, architecture_of, classifier_heads, head_of, required, tied
from flaxcompress.families.bert import IGNORED, RENAMES, read_encoder, write_encoder

_HEADS = {
    "masked_lm": ("AlbertForMaskedLM",),
    "pretraining": ("AlbertForPreTraining",),
    **classifier_heads("Albert", "sequence_classification", "token_classification", "span"),
}


def group_map(layers: int, groups: int) -> tuple[int, ...]:
    """The group that each layer uses: neighbours, ⌊l·G/L⌋."""
    return tuple(int(layer / (layers / groups)) for layer in range(layers))


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """transformers' AlbertConfig -> ModelConfig."""
    required(hf, "albert", ("num_hidden_layers",))
    if hf.get("inner_group_num", 1) != 1:
        raise ValueError(f"config.json: inner_group_num {hf['inner_group_num']} is not supported, only 1")
    head = head_of(hf, _HEADS)
    tied(hf, head)
    layers, groups = hf["num_hidden_layers"], hf.get("num_hidden_groups", 1)
    if not 1 <= groups <= layers:
        raise ValueError(f"config.json: num_hidden_groups {groups} is not in 1 … {layers}, the number of layers")
    each = group_map(layers, groups)
    return read_encoder(
        {"hidden_act": "gelu_new", "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0, **hf},
        "albert",
        head=head,
        embedding_width=hf.get("embedding_size", 128),
        sharing=Sharing(attention=each, feed_forward=each, norms=each),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_config`. Raises ValueError for a sharing map that ALBERT's groups cannot say."""
    groups = config.sharing.sets("attention")
    each = group_map(config.layers, groups)
    if any(getattr(config.sharing, part) != each for part in config.sharing.parts):
        raise ValueError(
            f"export: ALBERT's groups share everything between neighbours; the map {list(config.sharing.attention)} of "
            "attention, or that of another part, is another"
        )
    architecture = architecture_of(config, _HEADS, "AlbertModel")
    more = {"embedding_size": config.table_width, "num_hidden_groups": groups, "inner_group_num": 1}
    return write_encoder(config, "albert", architecture, **more)


def names(config: ModelConfig) -> Names:
    """Where a checkpoint holds every weight, a group's once."""
    out = Names()
    out.table("embedding/token", "embeddings.word_embeddings")
    out.table("embedding/position", "embeddings.position_embeddings")
    if config.segments:
        out.table("embedding/segment", "embeddings.token_type_embeddings")
    out.norm("embedding/norm", "embeddings.LayerNorm")
    out.linear("embedding/projection", "encoder.embedding_hidden_mapping_in")
    for group in range(config.sharing.sets("attention")):
        ours, theirs = f"layers/{group}", f"encoder.albert_layer_groups.{group}.albert_layers.0"
        for projection in ("query", "key", "value"):
            out.linear(f"{ours}/attention/{projection}", f"{theirs}.attention.{projection}")
        out.linear(f"{ours}/attention/output", f"{theirs}.attention.dense")
        out.linear(f"{ours}/feed_forward/up", f"{theirs}.ffn")
        out.linear(f"{ours}/feed_forward/down", f"{theirs}.ffn_output")
        out.norm(f"{ours}/norms/attention", f"{theirs}.attention.LayerNorm")
        out.norm(f"{ours}/norms/feed_forward", f"{theirs}.full_layer_layer_norm")
    if config.pooler:
        out.linear("pooler/dense", "pooler")
    if config.head in ("masked_lm", "pretraining"):
        out.linear("head/transform", "predictions.dense")
        out.norm("head/norm", "predictions.LayerNorm")
        out.vector("head/bias", "predictions.bias")
    if config.head == "pretraining":
        out.linear("head/order", "sop_classifier.classifier")
    out.classifier(config)
    return out


FAMILY = Family(
    model_type="albert",
    read_config=read_config,
    write_config=write_config,
    names=names,
    heads=_HEADS,
    shares=True,
    renames=RENAMES,
    ignored=(*IGNORED, r"predictions\.decoder\.(weight|bias)"),  # tied to the token table and to predictions.bias
    head_prefixes=("predictions.", "sop_classifier.", "classifier.", "qa_outputs.", "pooler."),
)
