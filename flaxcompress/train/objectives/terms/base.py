"""What a term of distillation is, and what it is computed from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flaxcompress.config import ModelConfig
from flaxcompress.nn import TransformerOutput
from flaxcompress.nn.packs import same_document
from flaxcompress.ops import both, sight
from flaxcompress.text import Pooling
from flaxcompress.train.objectives.base import Term


def attending(config: ModelConfig) -> ModelConfig:
    """The part whose attention the outputs are of: the decoder, where there is one."""
    return config if config.decoder is None else config.decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """What a student and a teacher made of one batch.

    Attributes:
      settings: the fields of all terms, see `Settings`.
      student, teacher: the configs.
      ours, theirs: the outputs of student and teacher; no gradient goes into the latter.
      mask: the tokens that count, [B, T]; with a decoder those of the decoder.
      pooling: of the teacher.
    """

    settings: Any
    student: ModelConfig
    teacher: ModelConfig
    ours: TransformerOutput
    theirs: TransformerOutput
    batch: Mapping[str, Any]
    mask: Bool[Array, "B T"]
    pooling: Pooling

    @property
    def sees(self) -> Bool[Array, "#B T T"]:
        """Which tokens each token may see: real ones of its document, none after it where a model is causal."""
        real = same_document(self.batch["packs"]) if "packs" in self.batch else self.mask
        places = jnp.arange(self.mask.shape[1])
        found = both(
            real, sight(places, places, causal=any(c.causal for c in map(attending, (self.student, self.teacher))))
        )
        assert found is not None
        return found


def _nothing(settings: Any, where: str) -> None:
    del settings, where


def _always(settings: Any, student: ModelConfig, teacher: ModelConfig) -> bool:
    del settings, student, teacher
    return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillTerm:
    """One term of the loss: its file also has a dataclass with the settings that it reads, the weight among them.

    Attributes:
      name: of the term, and of the setting with its weight.
      of: the term of a batch, unscaled.
      needs: what it reads beside the last hidden state, as `Transformer` calls it: "need_" before it is an option.
      check: raises ValueError for settings that are wrong by themselves; called with (settings, where they stand).
      fits: whether the term can be had of (settings, student, teacher); raises ValueError where it cannot but should.
    """

    name: str
    of: Callable[[Pair], Term]
    needs: tuple[str, ...] = ()
    check: Callable[[Any, str], None] = _nothing
    fits: Callable[[Any, ModelConfig, ModelConfig], bool] = _always


def check_width(what: str, term: str, student: ModelConfig, teacher: ModelConfig) -> None:
    """Raises ValueError where student and teacher have different widths, and their vectors cannot be compared."""
    if teacher.width != student.width:
        raise ValueError(
            f"distill: the teacher's {what} have width {teacher.width}, the student's {student.width}: they cannot be "
            f"compared; use {term}=0, or relations, which may differ in width"
        )


def counted(batch: Mapping[str, Any], x: Float[Array, "B T D"]) -> Bool[Array, "B T"]:
    """The tokens that count: those of the decoder, where there is one, that are no padding."""
    if "packs" in batch:
        return jnp.asarray(batch["packs"]) > 0
    mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
    return jnp.ones(x.shape[:2], bool) if mask is None else jnp.asarray(mask)
