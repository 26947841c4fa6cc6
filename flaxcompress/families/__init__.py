"""Hugging Face families by model_type. A new family is one file and one entry here."""

from flaxcompress.families import (
    albert,
    bert,
    deepseek,
    distilbert,
    electra,
    gpt2,
    llama,
    modernbert,
    mpnet,
    roberta,
    vit,
)
from flaxcompress.families.base import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        bert.FAMILY,
        roberta.ROBERTA,
        roberta.XLM_ROBERTA,
        distilbert.FAMILY,
        mpnet.FAMILY,
        electra.FAMILY,
        albert.FAMILY,
        modernbert.FAMILY,
        gpt2.FAMILY,
        llama.LLAMA,
        llama.MISTRAL,
        llama.QWEN2,
        llama.QWEN3,
        deepseek.V2,
        deepseek.V3,
        vit.FAMILY,
    )
}

__all__ = ["FAMILIES", "Family"]
