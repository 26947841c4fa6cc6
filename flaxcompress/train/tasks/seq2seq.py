"""What the tasks of encoders with decoders have in common."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from flaxcompress.train.tasks.base import Task, integers, token_shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2SeqTask(Task):
    """A text from another one; both may be as long as `training.length`."""

    structure: ClassVar[str] = "seq2seq"

    @property
    def head(self):
        return "seq2seq_lm"

    def shapes(self, rows, length, model):
        ids, mask = integers(rows, length), jax.ShapeDtypeStruct((rows, length), bool)
        return token_shapes(rows, length, decoder_input_ids=ids, decoder_attention_mask=mask, labels=ids)
