"""MPNet (Song et al. 2020): BERT with RoBERTa's positions, no segments, and a relative position bias for all layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxcompress.config import Classifier, ModelConfig
from flaxcompress.families.base import Family, Names, architecture_of, classifier_heads, head_of, tied
from flaxcompress.families.bert import IGNORED, RENAMES, encoder_names, read_encoder, write_encoder
from flaxcompress.families.roberta import HEAD_COPIES, TRANSFORMED, add_classifier, add_head

_SPELLING = (
    (".attention.self.query", ".attention.attn.q"),
    (".attention.self.key", ".attention.attn.k"),
    (".attention.self.value", ".attention.attn.v"),
    (".attention.output.dense", ".attention.attn.o"),
    (".attention.output.LayerNorm", ".attention.LayerNorm"),
)


_HEADS = {
    "masked_lm": ("MPNetForMaskedLM",),
    **classifier_heads("MPNet", "sequence_classification", "token_classification", "span"),
}


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """transformers' MPNetConfig -> ModelConfig."""
    head = head_of(hf, _HEADS)
    tied(hf, head)
    pad = 1 if hf.get("pad_token_id") is None else hf["pad_token_id"]
    if pad != 1:  # transformers' position table counts from 2 whatever the config says
        raise ValueError(f"config.json: pad_token_id {pad} is not supported for mpnet, only 1")
    return read_encoder(
        hf,
        "mpnet",
        head=head,
        head_activation={"masked_lm": "gelu", "sequence_classification": "tanh"}.get(head),
        classifier=TRANSFORMED if head == "sequence_classification" else Classifier(),
        segments=0,
        pad_token=pad,
        position_offset=pad + 1,
        positions=hf.get("max_position_embeddings", 512) - pad - 1,
        relative_buckets=hf.get("relative_attention_num_buckets", 32),
        relative_distance=128,  # fixed in transformers
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    architecture = architecture_of(config, _HEADS, "MPNetModel")
    out = write_encoder(config, "mpnet", architecture, relative_attention_num_buckets=config.relative_buckets)
    del out["type_vocab_size"]
    return out


def names(config: ModelConfig) -> Names:
    """Where a checkpoint holds every weight."""
    out = Names()
    for address, stored in encoder_names(config).items():
        for old, new in _SPELLING:
            stored = stored._replace(name=stored.name.replace(old, new))
        out[address] = stored
    out.table("relative_bias/table", "encoder.relative_attention_bias")
    if config.head == "masked_lm":
        add_head(out)
    add_classifier(out, config)
    return out


FAMILY = Family(
    model_type="mpnet",
    read_config=read_config,
    write_config=write_config,
    names=names,
    heads=_HEADS,
    renames=RENAMES,
    ignored=(*IGNORED, *HEAD_COPIES),
    head_prefixes=("lm_head.", "classifier.", "qa_outputs.", "pooler."),
)
