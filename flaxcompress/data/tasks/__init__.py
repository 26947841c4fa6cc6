"""Batches for each training task; a new one is one file here."""

from flaxcompress.data.tasks.causal_lm import causal_lm_batches
from flaxcompress.data.tasks.masked_lm import masked_lm_batches

__all__ = ["causal_lm_batches", "masked_lm_batches"]
