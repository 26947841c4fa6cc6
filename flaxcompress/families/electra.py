"""ELECTRA (Clark et al. 2020): BERT with embeddings of a width of their own; discriminator and generator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxcompress.config import Classifier, ModelConfig
from flaxcompress.families.base import Family, Names, architecture_of, classifier_heads, head_of, tied
from flaxcompress.families.bert import IGNORED, RENAMES, encoder_names, read_encoder, write_encoder
from flaxcompress.families.roberta import TRANSFORMED, add_classifier

_HEADS = {
    "replaced_token": ("ElectraForPreTraining",),
    "masked_lm": ("ElectraForMaskedLM",),
    **classifier_heads("Electra", "sequence_classification", "token_classification", "span"),
}


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """transformers' ElectraConfig -> ModelConfig."""
    head = head_of(hf, _HEADS)
    tied(hf, head)
    inner = hf.get("embedding_size", 128)
    return read_encoder(
        hf,
        "electra",
        head=head,
        head_activation="gelu" if head in ("masked_lm", "sequence_classification") else None,
        classifier=TRANSFORMED if head == "sequence_classification" else Classifier(),
        embedding_width=None if inner == hf.get("hidden_size") else inner,
        pooler=False,
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    architecture = architecture_of(config, _HEADS, "ElectraModel")
    return write_encoder(config, "electra", architecture, embedding_size=config.table_width)


def names(config: ModelConfig) -> Names:
    """Where a checkpoint holds every weight."""
    out = encoder_names(config)
    if config.embedding_width is not None:
        out.linear("embedding/projection", "embeddings_project")
    if config.head == "masked_lm":
        out.linear("head/transform", "generator_predictions.dense")
        out.norm("head/norm", "generator_predictions.LayerNorm")
        out.vector("head/bias", "generator_lm_head.bias")
    elif config.head == "replaced_token":
        out.linear("head/transform", "discriminator_predictions.dense")
        out.linear("head/output", "discriminator_predictions.dense_prediction")
    add_classifier(out, config)
    return out


FAMILY = Family(
    model_type="electra",
    read_config=read_config,
    write_config=write_config,
    names=names,
    heads=_HEADS,
    renames=RENAMES,
    ignored=(*IGNORED, r"generator_lm_head\.weight"),  # tied to the token table
    head_prefixes=("discriminator_predictions.", "generator_", "classifier.", "qa_outputs.", "sequence_summary."),
)
