"""What a run can learn. A new task is one file and one entry in `TASKS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxcompress.config import closest
from flaxcompress.config.typed import read_settings
from flaxcompress.train.tasks.base import Task
from flaxcompress.train.tasks.causal_lm import CausalLMTask
from flaxcompress.train.tasks.classification import ClassificationTask
from flaxcompress.train.tasks.data import TaskData
from flaxcompress.train.tasks.distillation import DistillTask
from flaxcompress.train.tasks.images import ImagesTask
from flaxcompress.train.tasks.masked_lm import MaskedLMTask
from flaxcompress.train.tasks.span_corruption import SpanCorruptionTask
from flaxcompress.train.tasks.tagging import TaggingTask
from flaxcompress.train.tasks.translation import TranslationTask

__all__ = ["TASKS", "Task", "TaskData", "read_task"]

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        MaskedLMTask,
        CausalLMTask,
        SpanCorruptionTask,
        TranslationTask,
        ClassificationTask,
        TaggingTask,
        ImagesTask,
        DistillTask,
    )
}


def read_task(data: Any, where: str = "task") -> Task:
    """A task from its name, or from {name: …, settings}. Raises ValueError for unknown names and settings."""
    data = {"name": data} if isinstance(data, str) else data
    if not isinstance(data, Mapping) or "name" not in data:
        raise ValueError(f"{where}: expected a name, or settings with a name; got {data!r}")
    name = data["name"]
    if name not in TASKS:
        raise ValueError(f"{where}: unknown task {name!r}; {closest(str(name), TASKS)}")
    return read_settings(TASKS[name], {k: v for k, v in data.items() if k != "name"}, where)
