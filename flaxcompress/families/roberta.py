"""RoBERTa (Liu et al. 2019) and XLM-RoBERTa (Conneau et al. 2020): BERT whose positions count from after padding's."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from flaxcompress.config import Classifier, ModelConfig
from flaxcompress.families.base import Family, Names, architecture_of, classifier_heads, head_of, tied
from flaxcompress.families.bert import IGNORED, RENAMES, encoder_names, read_encoder, write_encoder


def _heads(classes: str) -> dict[str, tuple[str, ...]]:
    more = classifier_heads(classes, "sequence_classification", "token_classification", "span")
    return {"masked_lm": (f"{classes}ForMaskedLM",), **more}


def read_config(hf: Mapping[str, Any], *, family: str, classes: str) -> ModelConfig:
    """transformers' RobertaConfig or XLMRobertaConfig -> ModelConfig."""
    head = head_of(hf, _heads(classes))
    tied(hf, head)
    pad = 1 if hf.get("pad_token_id") is None else hf["pad_token_id"]
    return read_encoder(
        hf,
        family,
        head=head,
        head_activation={"masked_lm": "gelu", "sequence_classification": "tanh"}.get(head),
        classifier=TRANSFORMED if head == "sequence_classification" else Classifier(),
        pad_token=pad,
        position_offset=pad + 1,
        positions=hf.get("max_position_embeddings", 512) - pad - 1,
    )


def write_config(config: ModelConfig, *, family: str, classes: str) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return write_encoder(config, family, architecture_of(config, _heads(classes), f"{classes}Model"))


def names(config: ModelConfig) -> Names:
    """Where a checkpoint holds every weight."""
    out = encoder_names(config)
    if config.head == "masked_lm":
        add_head(out)
    add_classifier(out, config)
    return out


TRANSFORMED = Classifier(pooling="first", transform=True)


def add_classifier(out: Names, config: ModelConfig) -> None:
    """A classifier's head as RoBERTa names it: two maps for sequences, one for tokens."""
    whole = config.classifier.transform
    out.classifier(config, "classifier.out_proj" if whole else "", transform="classifier.dense")


def add_head(out: Names) -> None:
    """The masked-LM head as RoBERTa names it."""
    out.linear("head/transform", "lm_head.dense")
    out.norm("head/norm", "lm_head.layer_norm")
    out.vector("head/bias", "lm_head.bias")


HEAD_COPIES = (r"lm_head\.decoder\.(weight|bias)",)  # tied to the token table and to lm_head.bias


def _family(model_type: str, classes: str) -> Family:
    return Family(
        model_type=model_type,
        read_config=functools.partial(read_config, family=model_type, classes=classes),
        write_config=functools.partial(write_config, family=model_type, classes=classes),
        names=names,
        heads=_heads(classes),
        base="roberta",
        renames=RENAMES,
        ignored=(*IGNORED, *HEAD_COPIES),
        head_prefixes=("lm_head.", "classifier.", "qa_outputs.", "pooler."),
    )


ROBERTA = _family("roberta", "Roberta")
XLM_ROBERTA = _family("xlm-roberta", "XLMRoberta")
