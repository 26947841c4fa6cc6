"""The settings of a training run: what `flaxcompress train CONFIG.yaml` reads, typed, with defaults."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flaxcompress.config import reject_unknown
from flaxcompress.config.typed import convert
from flaxcompress.config.yaml_file import differences, dump_yaml, read_yaml, with_changes, with_variables
from flaxcompress.train.mesh import parse_mesh
from flaxcompress.train.optimizer import Optimizer
from flaxcompress.train.settings import (
    DataSettings,
    MetricsSettings,
    ModelSettings,
    TokenizerSettings,
    TrainingSettings,
)
from flaxcompress.train.tasks import Task, TaskData, read_task

FILE = "config.yaml"
# What may change between two parts of one run: it changes what a step computes by rounding errors at most.
_HARMLESS = (
    "mesh",
    "out",
    "metrics/",
    "training/save_every",
    "training/keep_last",
    "training/keep_best",
    "training/remat",
    "training/unroll",
    "training/memory_limit",
    "data/threads",
    "data/cache",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
      out: the folder (or "gs://…") for checkpoints, metrics, the report and the trained model.
      mesh: the devices' axes, such as "data=8,model=2"; None: all devices in "data".
    """

    model: ModelSettings
    task: Task
    data: DataSettings
    training: TrainingSettings
    out: str
    tokenizer: TokenizerSettings | None = None
    optimizer: Optimizer = Optimizer()  # noqa: RUF009  (frozen)
    mesh: str | None = None
    metrics: MetricsSettings = MetricsSettings()  # noqa: RUF009  (frozen)

    def __post_init__(self):
        if self.mesh is not None:
            parse_mesh(self.mesh)
        if not self.out:
            raise ValueError("out: names no folder")
        if self.model.load is not None and self.tokenizer is not None:
            raise ValueError("tokenizer: a loaded model has its own; leave it out")
        training = self.training
        if training.z_loss and not self.task.has_z_loss:
            raise ValueError(f"training/z_loss: {self.task.name} has none; leave it out")
        self.optimizer.learning_rates(training.steps)
        if self.optimizer.prune is not None and (training.take_best or training.ema):
            raise ValueError(
                "optimizer/prune: take_best and ema would give weights that are not as sparse as asked for; leave them "
                "out of training"
            )
        measured = (training.evaluate_every, training.keep_best, training.take_best, training.patience)
        if any(measured) and not self.data.validates:
            raise ValueError(
                "data/validation: names no file, and hold_out is 0, but training asks for evaluations or the best "
                "checkpoint"
            )
        self._check_columns()

    @property
    def trainable(self) -> str:
        """The pattern of what is trained (see `partition`)."""
        if self.training.trainable is not None:
            return self.training.trainable
        tuning = self.model.tuning
        return ".*" if tuning is None else f"{tuning.trainable}|head/.*"

    @property
    def task_data(self) -> TaskData:
        """The data of the run, read when asked for."""
        return self.task.data(self.data, self.training)

    def _check_columns(self) -> None:
        named, task = self.data.columns, self.task
        if named and len(named) not in task.columns:
            said = " or ".join(map(str, sorted(task.columns))) or "none"
            raise ValueError(f"data/columns: {task.name} reads {said}, got {len(named)}: {', '.join(named)}")
        apart = bool(self.data.train_targets) != bool(self.data.validation_targets)
        if self.data.validation and apart and task.targets != "allowed":  # npz files have their labels inside
            raise ValueError("data: train_targets and validation_targets are given together, or neither is")
        if self.data.train_targets and not task.targets:
            raise ValueError(f"data/train_targets: {task.name} reads none; leave them out")
        if task.targets == "needed" and not (self.data.train_targets or named):
            raise ValueError(f"data: {task.name} needs train_targets, or columns of records")

    @classmethod
    def load(cls, path: str | Path, changes: Iterable[str] = ()) -> TrainConfig:
        """Reads a YAML file and changes such as "training.steps=100"; ${NAME} stands for an environment variable.

        Raises FileNotFoundError, and ValueError with the path of what is unknown, missing or of another type.
        """
        return cls.from_dict(with_variables(with_changes(read_yaml(path), changes)), where=str(path))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], *, where: str = "config") -> TrainConfig:
        """The inverse of `resolved`."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        reject_unknown(where, settings, fields)
        missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in settings]
        if missing:
            raise ValueError(f"{where}: missing {', '.join(missing)}")
        values = dict(settings)
        if isinstance(values.get("tokenizer"), str):
            values["tokenizer"] = {"load": values["tokenizer"]}
        values["task"] = read_task(values["task"])
        kinds = {
            "model": ModelSettings,
            "data": DataSettings,
            "training": TrainingSettings,
            "out": str,
            "tokenizer": TokenizerSettings | None,
            "optimizer": Optimizer,
            "mesh": str | None,
            "metrics": MetricsSettings,
        }
        return cls(**{n: v if n == "task" else convert(v, kinds[n], n) for n, v in values.items()})

    def resolved(self) -> dict[str, Any]:
        """All settings, defaults included, as plain values: what is written to config.yaml in `out`."""
        out = _plain(dataclasses.asdict(self))
        out["task"] = {"name": self.task.name, **out["task"]}
        if (tuning := self.model.tuning) is not None:
            out["model"]["tuning"] = {"name": tuning.name, **out["model"]["tuning"]}
        return out

    def to_yaml(self) -> str:
        """`resolved` as YAML."""
        return dump_yaml(self.resolved())

    def changed(self, earlier: Mapping[str, Any]) -> list[str]:
        """What differs from the settings of an earlier part of the run and may change its result, a line each."""
        with contextlib.suppress(ValueError, TypeError):  # settings that came up since then had their defaults
            earlier = TrainConfig.from_dict(earlier).resolved()
        return [line for line in differences(earlier, self.resolved()) if not line.startswith(_HARMLESS)]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
