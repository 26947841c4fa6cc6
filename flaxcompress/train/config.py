"""The settings of a training run: what `flaxcompress train CONFIG.yaml` reads, typed, with defaults."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from flaxcompress.config import reject_unknown
from flaxcompress.config.typed import convert
from flaxcompress.config.yaml_file import differences, dump_yaml, read_yaml, with_changes, with_variables
from flaxcompress.train.mesh import parse_mesh
from flaxcompress.train.optimizer import Optimizer
from flaxcompress.train.tasks import Task, read_task

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
class ModelSettings:
    """The model that is trained: loaded, or drawn anew from a structure.

    Attributes:
      load: a folder, a hub id, or minilm.
      architecture: a published one: albert-base, albert-large, albert-xlarge, albert-xxlarge.
      config: fields of `ModelConfig`; beside `architecture`, those that differ from it; or those of a Hugging Face
        config.json, with its model_type, and formats. The vocabulary is the tokenizer's unless it is given. In formats,
        low_rank may have keep, a share of a matrix's values, in place of rank.
      head: the model's head; None: the task's, or the one that a loaded model has for the task.
      classes: C, of a classifier.
    """

    load: str | None = None
    architecture: str | None = None
    config: Mapping[str, Any] | None = None
    head: str | None = None
    classes: int | None = None

    def __post_init__(self):
        if self.load is not None and (self.architecture is not None or self.config is not None):
            raise ValueError("model: a loaded model has its structure; give load, or architecture and config")
        if self.load is None and self.architecture is None and self.config is None:
            raise ValueError("model: give load (a folder, a hub id, minilm), architecture (albert-base …) or config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """The tokenizer of a model that is drawn anew: a folder's, or one trained on the training text.

    Attributes:
      load: a folder with a tokenizer's files.
      kind: of one to train: wordpiece, bpe or unigram.
      vocabulary: V of one to train.
      lowercase: whether a trained one lowers text.
    """

    load: str | None = None
    kind: Literal["wordpiece", "bpe", "unigram"] | None = None
    vocabulary: int | None = None
    lowercase: bool = False

    def __post_init__(self):
        if (self.load is None) == (self.kind is None):
            raise ValueError("tokenizer: give load (a folder) or kind (wordpiece, bpe, unigram), one of them")
        if self.kind is not None and (self.vocabulary is None or self.vocabulary < 1):
            raise ValueError(f"tokenizer: kind {self.kind!r} needs vocabulary, its size, got {self.vocabulary}")
        if self.load is not None and (self.vocabulary is not None or self.lowercase):
            raise ValueError("tokenizer: vocabulary and lowercase are for one that is trained; leave them out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is read.

    Attributes:
      train, validation: files, FILE:column, data sets of the Hub ("hf:owner/name"); one, or a list.
      train_targets, validation_targets: where these are files of their own: the translations, line by line, and the
        labels of images.
      columns: the columns of records that the task reads, in its order: the text; text and label, or two texts and
        label; source and target.
      hold_out: so many examples at the end of the training data (documents, pairs, labelled texts, images) are not
        trained on: they are the validation data.
      separator: what stands between the documents of plain text files; None: each line is one; "": blank lines.
      max_bad_lines: so many lines that cannot be read are skipped.
      cache: a folder that keeps tokens.
      threads: that make batches.
    """

    train: str | tuple[str, ...]
    validation: str | tuple[str, ...] = ()
    train_targets: str | tuple[str, ...] = ()
    validation_targets: str | tuple[str, ...] = ()
    hold_out: int = 0
    columns: tuple[str, ...] = ()
    separator: str | None = None
    max_bad_lines: int = 100
    cache: str | None = None
    threads: int = 2

    def __post_init__(self):
        for name in ("train", "validation", "train_targets", "validation_targets"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else given)
        if not self.train:
            raise ValueError("data/train: names no file; give at least one")
        for files, targets in ((self.train, self.train_targets), (self.validation, self.validation_targets)):
            if targets and len(targets) != len(files):
                raise ValueError(f"data: {len(files)} files, but {len(targets)} of targets; give one for each")
        if self.hold_out > 0 and self.validation:
            raise ValueError("data: hold_out takes validation data from the training data; give it or validation")
        for name in ("hold_out", "max_bad_lines", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"data/{name}: must not be negative, got {getattr(self, name)}")

    @property
    def validates(self) -> bool:
        """Whether there are validation data."""
        return bool(self.validation or self.hold_out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How long and in what way; the fields that `fit` has too mean the same as there.

    Attributes:
      steps, batch_size, length: optimizer steps; rows of a step, over all devices and microbatches; tokens of a row.
      buckets: rows that are not packed are padded to one of these lengths, the last one being `length`; or to one of so
        many, evenly apart. Each costs a compilation.
      seed: of everything random: the start, dropout, the order of the data.
      z_loss: see `cross_entropy`.
      validation_batches: batches of an evaluation at most; None: all.
    """

    steps: int
    batch_size: int
    length: int = 128
    buckets: int | tuple[int, ...] = 4
    accumulate: int = 1
    remat: Literal["none", "dots", "full"] = "dots"
    unroll: int = 1
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    seed: int = 0
    z_loss: float = 0.0
    memory_limit: str | None = None
    ema: float | None = None
    spike: float | None = None
    trainable: str = ".*"
    save_every: int = 1000
    keep_last: int = 2
    keep_best: int = 0
    evaluate_every: int = 0
    validation_batches: int | None = None
    best: str = "loss"
    best_mode: Literal["min", "max"] = "min"
    take_best: bool = False

    def __post_init__(self):
        for name in ("steps", "batch_size", "length", "accumulate", "unroll", "save_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"training/{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("keep_best", "evaluate_every", "z_loss"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"training/{name}: must not be negative, got {getattr(self, name)}")
        if self.validation_batches is not None and self.validation_batches < 1:
            raise ValueError(f"training/validation_batches: must be at least 1, got {self.validation_batches}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"training/seed: must lie in 0 … {2**32 - 1}, got {self.seed}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"training/accumulate: {self.batch_size} rows cannot be split into {self.accumulate} microbatches; "
                "choose a divisor"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsSettings:
    """Where a run's values are written beside metrics.jsonl.

    Attributes:
      every: steps between lines; evaluations are always written.
      tensorboard: also as TensorBoard's event files.
      wandb: a project of Weights & Biases.
      measure_peak: where the device's peak is not known, MFU is told relative to a matrix product that is timed first.
    """

    every: int = 1
    tensorboard: bool = False
    wandb: str | None = None
    measure_peak: bool = False

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"metrics/every: must be at least 1, got {self.every}")


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
    metrics: MetricsSettings = MetricsSettings()

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
        if (training.evaluate_every or training.keep_best or training.take_best) and not self.data.validates:
            raise ValueError(
                "data/validation: names no file, and hold_out is 0, but training asks for evaluations or the best "
                "checkpoint"
            )
        self._check_columns()

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
