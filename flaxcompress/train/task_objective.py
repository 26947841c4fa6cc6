"""From settings to what a run minimises."""

from __future__ import annotations

from flaxcompress.folder import load
from flaxcompress.train.config import TrainConfig
from flaxcompress.train.objectives import Classification, Distill, MaskedLM, NextToken, Objective
from flaxcompress.train.tasks import ClassificationTask, DistillTask, ImagesTask, MaskedLMTask


def make_objective(config: TrainConfig) -> Objective:
    """What the task minimises. Raises ValueError for settings that it does not have."""
    task, z_loss = config.task, config.training.z_loss
    if isinstance(task, MaskedLMTask):
        return MaskedLM(order=task.order_weight, z_loss=z_loss)
    if isinstance(task, (ClassificationTask, ImagesTask, DistillTask)) and z_loss:
        raise ValueError(f"training/z_loss: {task.name} has none; leave it out")
    if isinstance(task, (ClassificationTask, ImagesTask)):
        return Classification(label_smoothing=task.label_smoothing)
    if isinstance(task, DistillTask):
        weights = {n: getattr(task, n) for n in ("cosine", "hidden", "logits", "temperature")}
        return Distill(teacher=load(task.teacher), **weights)
    return NextToken(label_smoothing=getattr(task, "label_smoothing", 0.0), z_loss=z_loss)
