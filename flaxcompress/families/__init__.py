"""Hugging Face families by model_type, and other kinds of checkpoints. A new one is one file and one entry here."""

from flaxcompress.families import (
    albert,
    albert_tf,
    bert,
    deepseek,
    distilbert,
    electra,
    gpt2,
    llama,
    llama2c,
    marian,
    modernbert,
    mpnet,
    roberta,
    t5,
    vit,
)
from flaxcompress.families.base import Checkpoint, Family

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
        t5.FAMILY,
        marian.FAMILY,
        vit.FAMILY,
    )
}

CHECKPOINTS: tuple[Checkpoint, ...] = (llama2c.CHECKPOINT, albert_tf.CHECKPOINT)

__all__ = ["CHECKPOINTS", "FAMILIES", "Checkpoint", "Family"]
