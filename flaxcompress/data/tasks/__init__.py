"""Batches for each training task; a new one is one file here."""

from flaxcompress.data.tasks.causal_lm import causal_lm_batches
from flaxcompress.data.tasks.classification import classification_batches
from flaxcompress.data.tasks.images import image_batches
from flaxcompress.data.tasks.masked_lm import masked_lm_batches
from flaxcompress.data.tasks.span_corruption import span_corruption_batches
from flaxcompress.data.tasks.tagging import tagging_batches
from flaxcompress.data.tasks.translation import translation_batches

__all__ = [
    "causal_lm_batches",
    "classification_batches",
    "image_batches",
    "masked_lm_batches",
    "span_corruption_batches",
    "tagging_batches",
    "translation_batches",
]
