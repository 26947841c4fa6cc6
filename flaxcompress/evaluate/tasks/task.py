"""What tasks have in common: their form, and how they refuse a model or data that do not fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from flaxcompress.data.calibration import source_name
from flaxcompress.data.documents import source_files
from flaxcompress.data.portion import Portion
from flaxcompress.model import Model

Result = dict[str, Any]
Task = Callable[..., Result]  # (model, data=, reference=, progress=, options): the keywords are the task's options
_GIVEN = ("data", "reference", "progress")
_Item = TypeVar("_Item")


def options_of(task: Task) -> tuple[str, ...]:
    """The names of a task's options."""
    parameters = inspect.signature(task).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _GIVEN)


def need_head(model: Model, task: str, *heads: str, who: str = "the model") -> None:
    """Raises ValueError for a model that has none of these heads."""
    if model.config.head not in heads:
        wanted = " or ".join(map(repr, heads))
        raise ValueError(
            f"{task}: a model with the head {wanted} is needed, but {who} has {model.config.head!r}; give a checkpoint "
            "that has it, or train one (flaxcompress train)"
        )


def need_text(model: Model, task: str, *, who: str = "the model") -> None:
    """Raises ValueError for a model that reads images."""
    if model.config.patches is not None:
        raise ValueError(f"{task}: {who} reads images, not text; evaluate it on the task 'images'")


def need_data(data: Any, task: str, what: str) -> None:
    """Raises ValueError where no data are given."""
    if data is None:
        raise ValueError(f"{task}: no data; give {what}")


def need_count(task: str, name: str, value: Any, least: int = 1) -> None:
    """Raises ValueError for an option that is no number from `least` on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{task}: {name} must be {least} or more, got {value!r}")


def last_of(items: Iterable[_Item], hold_out: int, task: str) -> list[_Item]:
    """The last `hold_out` items, which training with the same data/hold_out does not see; all of them for 0."""
    need_count(task, "hold_out", hold_out, 0)
    return list(Portion(hold_out, held_out=True).of(items))


def data_name(data: Any, otherwise: str) -> str:
    """The files' names without their folders; `otherwise` for data in memory."""
    if isinstance(data, (str, Path, Sequence)) and (files := source_files(data)) is not None:
        return source_name(files)
    return otherwise


def beside(figures: Result, reference: Result | None) -> Result:
    """Figures, and those of the reference with that before their names."""
    return figures | {f"reference_{name}": value for name, value in (reference or {}).items()}
