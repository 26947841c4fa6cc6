"""What a run can learn, as settings: which batches are made and which loss is minimised."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flaxcompress.config import closest
from flaxcompress.config.typed import read_settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Base of the tasks.

    Attributes:
      columns: how many columns of records can be named.
      targets: whether what is to be learned can stand in files of its own, "allowed" or "needed".
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[int, ...]] = (1,)
    targets: ClassVar[str] = ""

    @property
    def head(self) -> str:
        """The head that a model made for the task has."""
        raise NotImplementedError(f"{type(self).__name__}.head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLMTask(Task):
    """Masked tokens, and whether two stretches of text are in order (see `data.masked_lm_batches`).

    Attributes:
      order_weight: of the sentences' order in the loss.
    """

    name: ClassVar[str] = "masked_lm"

    mask_rate: float = 0.15
    ngram: int = 3
    whole_word: bool = True
    sentence_order: bool = False
    order_weight: float = 1.0
    pack: bool = False

    @property
    def head(self) -> str:
        return "pretraining" if self.sentence_order else "masked_lm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLMTask(Task):
    """The next token (see `data.causal_lm_batches`)."""

    name: ClassVar[str] = "causal_lm"

    pack: bool = True

    @property
    def head(self) -> str:
        return "causal_lm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruptionTask(Task):
    """Runs of tokens that were taken out of a text, told by a decoder (see `data.span_corruption_batches`)."""

    name: ClassVar[str] = "span_corruption"

    density: float = 0.15
    mean_span: float = 3.0

    @property
    def head(self) -> str:
        return "seq2seq_lm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranslationTask(Task):
    """A second text from a first one (see `data.translation_batches`).

    Attributes:
      label_smoothing: the share of the target spread over the vocabulary.
    """

    name: ClassVar[str] = "translation"
    columns: ClassVar[tuple[int, ...]] = (2,)
    targets: ClassVar[str] = "needed"

    label_smoothing: float = 0.1

    @property
    def head(self) -> str:
        return "seq2seq_lm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesTask(Task):
    """A class for each image (see `data.image_batches`).

    Attributes:
      label_smoothing: the share of the target spread over all classes.
      mean, std: of the pixels between 0 and 1.
      flip, shift: how images are varied while training.
    """

    name: ClassVar[str] = "images"
    columns: ClassVar[tuple[int, ...]] = ()
    targets: ClassVar[str] = "allowed"

    label_smoothing: float = 0.0
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5
    flip: bool = False
    shift: int = 0

    @property
    def head(self) -> str:
        return "sequence_classification"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationTask(Task):
    """A class, or a number, for each text or pair of texts (see `data.read_labelled`).

    Attributes:
      label_smoothing: the share of the target spread over all classes.
      regression: labels are numbers.
    """

    name: ClassVar[str] = "classification"
    columns: ClassVar[tuple[int, ...]] = (2, 3)

    label_smoothing: float = 0.0
    regression: bool = False

    @property
    def head(self) -> str:
        return "sequence_classification"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillTask(Task):
    """What a teacher computes on text.

    Attributes:
      teacher: a folder, a hub id, or minilm.
      cosine, hidden, logits, temperature: the weights of the loss's terms, see `Distill`.
    """

    name: ClassVar[str] = "distill"

    teacher: str
    cosine: float = 1.0
    hidden: float = 1.0
    logits: float = 1.0
    temperature: float = 1.0

    @property
    def head(self) -> str:
        return "none"


TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        MaskedLMTask,
        CausalLMTask,
        SpanCorruptionTask,
        TranslationTask,
        ClassificationTask,
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
