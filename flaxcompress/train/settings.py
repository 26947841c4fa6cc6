"""The sections of a training run's settings that every task reads alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from flaxcompress.tuning import Tuning


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
      tuning: what is put on a loaded model, and trained alone with the head: lora, adapters, biases, prefix (see
        `tuning`).
    """

    load: str | None = None
    architecture: str | None = None
    config: Mapping[str, Any] | None = None
    head: str | None = None
    classes: int | None = None
    tuning: Tuning | None = None

    def __post_init__(self):
        if self.tuning is not None and self.load is None:
            raise ValueError(f"model/tuning: {self.tuning.name} is for a model that was trained; give load")
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
      trainable: None: everything, or what the tuning says and the head.
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
    trainable: str | None = None
    save_every: int = 1000
    keep_last: int = 2
    keep_best: int = 0
    evaluate_every: int = 0
    validation_batches: int | None = None
    best: str = "loss"
    best_mode: Literal["min", "max"] = "min"
    take_best: bool = False
    patience: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "length", "accumulate", "unroll", "save_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"training/{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("keep_best", "evaluate_every", "z_loss", "patience"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"training/{name}: must not be negative, got {getattr(self, name)}")
        if self.patience and not self.evaluate_every:
            raise ValueError("training/patience: counts evaluations; set evaluate_every")
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
