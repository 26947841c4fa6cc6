"""Distillation: a student learns what a teacher computes, on text without labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from flaxcompress.config import ModelConfig
from flaxcompress.model import Model
from flaxcompress.text import Pooling
from flaxcompress.train.objectives.base import Objective, Run, Terms
from flaxcompress.train.objectives.terms import (
    TERMS,
    Pair,
    Settings,
    check_layers,
    check_settings,
    counted,
    terms_in,
    values_of,
)

_READ = sorted({need for term in TERMS for need in (*term.needs, "logits")})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(Settings, Objective):
    """The weighted sum of the terms (`objectives/terms/`, where each says what it has to set); 0 leaves one out.

    Attributes:
      teacher: the model to learn from; it does not change.
    """

    dropout: bool = False
    teacher: Model

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        check_settings(self, "distill")
        check_layers(self.layers, self.teacher.config)

    @classmethod
    def classic(cls, teacher: Model, weight: float = 0.5, **settings: Any) -> Distill:
        """½·mean(KL(teacher‖student) + λ·squared error of the logits), λ = `weight`; other terms may be added."""
        return cls(
            teacher=teacher, **{"cosine": 0.0, "hidden": 0.0, "logits": 0.5, "logit_error": weight / 2, **settings}
        )

    def split(self) -> tuple[Objective, Any]:
        pooling = self.teacher.assets.pooling or Pooling()
        known = {"teacher": self.teacher.config, "pooling": pooling, "dropout": self.dropout}
        return _Distill(**values_of(self), **known), self.teacher.params


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Distill(Settings, Objective):
    """`Distill` without the teacher's arrays."""

    teacher: ModelConfig
    pooling: Pooling

    def loss(self, run: Run, constants: Any, batch: Mapping[str, Any]) -> Terms:
        student, teacher = run.config, self.teacher
        chosen = [term for term in terms_in(self) if term.fits(self, student, teacher)]
        read = {need for term in chosen for need in term.needs}
        options = {f"need_{need}": need in read for need in _READ}
        ours = run(batch, **options)
        theirs = jax.lax.stop_gradient(Run(constants, teacher, run.dtype)(batch, **options))
        mask = counted(batch, ours.last_hidden_state)
        known: dict[str, Any] = {"student": student, "teacher": teacher, "batch": batch, "mask": mask}
        pair = Pair(settings=self, ours=ours, theirs=theirs, pooling=self.pooling, **known)
        return {term.name: term.of(pair)._replace(scale=getattr(self, term.name)) for term in chosen}
