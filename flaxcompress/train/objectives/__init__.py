"""Objectives: what a training run minimises. A new one is one file and one line here."""

from flaxcompress.train.objectives.base import IGNORED, Objective, Program, Run, Term, Terms, cross_entropy, mean_of
from flaxcompress.train.objectives.classification import Classification
from flaxcompress.train.objectives.distillation import Distill
from flaxcompress.train.objectives.language import NextToken
from flaxcompress.train.objectives.masked_lm import MaskedLM
from flaxcompress.train.objectives.terms import (
    attention_term,
    cosine_term,
    hidden_term,
    logit_error_term,
    logits_term,
    relation_term,
)

__all__ = [
    "IGNORED",
    "Classification",
    "Distill",
    "MaskedLM",
    "NextToken",
    "Objective",
    "Program",
    "Run",
    "Term",
    "Terms",
    "attention_term",
    "cosine_term",
    "cross_entropy",
    "hidden_term",
    "logit_error_term",
    "logits_term",
    "mean_of",
    "relation_term",
]
