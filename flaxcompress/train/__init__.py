"""Training: objectives, optimizer, checkpoints and the loop."""

from flaxcompress.train.fit import fit
from flaxcompress.train.loop import Limits, Memory, Stopped, train
from flaxcompress.train.objectives import Classification, Distill, MaskedLM, NextToken, Objective, Term
from flaxcompress.train.optimizer import Optimizer
from flaxcompress.train.rates import Rates, make_optimizer
from flaxcompress.train.step import Recipe
from flaxcompress.train.trainable import freeze_model, thaw_model

__all__ = [
    "Classification",
    "Distill",
    "Limits",
    "MaskedLM",
    "Memory",
    "NextToken",
    "Objective",
    "Optimizer",
    "Rates",
    "Recipe",
    "Stopped",
    "Term",
    "fit",
    "freeze_model",
    "make_optimizer",
    "thaw_model",
    "train",
]
