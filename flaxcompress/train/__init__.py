"""Training: objectives, optimizer, checkpoints and the loop."""

from flaxcompress.train.loop import train
from flaxcompress.train.optimizer import Optimizer
from flaxcompress.train.rates import Rates, make_optimizer
from flaxcompress.train.trainable import freeze_model, thaw_model

__all__ = ["Optimizer", "Rates", "freeze_model", "make_optimizer", "thaw_model", "train"]
