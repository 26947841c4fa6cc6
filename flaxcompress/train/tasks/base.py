"""A task: what a run can learn, as settings; its data, its loss, and the shapes of its batches."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flaxcompress.config import ModelConfig
from flaxcompress.train.objectives import Objective
from flaxcompress.train.settings import DataSettings, TrainingSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Base of the tasks.

    Attributes:
      columns: how many columns of records can be named.
      targets: whether what is to be learned can stand in files of its own, "allowed" or "needed".
      structure: of the models that learn it: "encoder", "decoder", "seq2seq" or "images".
      sentinels: how many special tokens a tokenizer that is trained for the task gets beside the usual ones.
      has_z_loss: whether the loss may have a z-loss.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[int, ...]] = (1,)
    targets: ClassVar[str] = ""
    structure: ClassVar[str] = "encoder"
    sentinels: ClassVar[int] = 0
    has_z_loss: ClassVar[bool] = True

    @property
    def head(self) -> str:
        """The head that a model made for the task has."""
        raise NotImplementedError(f"{type(self).__name__}.head")

    def data(self, files: DataSettings, training: TrainingSettings) -> Any:
        """The `TaskData` of a run, read when asked for."""
        raise NotImplementedError(f"{type(self).__name__}.data")

    def objective(self, z_loss: float) -> Objective:
        """What is minimised."""
        raise NotImplementedError(f"{type(self).__name__}.objective")

    def shapes(self, rows: int, length: int, model: ModelConfig) -> dict[str, Any]:
        """The longest batch that the data can give, over all processes: names, shapes and dtypes."""
        raise NotImplementedError(f"{type(self).__name__}.shapes")


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    """An int32 array's shape."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def token_shapes(rows: int, length: int, *, packed: bool = False, **more: Any) -> dict[str, Any]:
    """The shapes of a batch of texts: ids, a mask or the documents' numbers, and what else it has."""
    mask = jax.ShapeDtypeStruct((rows, length), bool)
    beside = {"packs": integers(rows, length)} if packed else {"attention_mask": mask}
    return {"input_ids": integers(rows, length), **more, **beside}
