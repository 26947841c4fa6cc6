"""Distillation: a student learns what a teacher computes, on text without labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flaxcompress.config import ModelConfig
from flaxcompress.encoding import pool
from flaxcompress.model import Model
from flaxcompress.text import Pooling
from flaxcompress.train.objectives.base import IGNORED, Objective, Run, Term, Terms


def cosine_term(student: Float[Array, "B D"], teacher: Float[Array, "B D"], real: Bool[Array, " B"]) -> Term:
    """1 - the mean cosine between sentence vectors, over the rows that are `real`."""
    s = student * jax.lax.rsqrt(jnp.maximum(jnp.square(student).sum(-1, keepdims=True), 1e-24))
    t = teacher * jax.lax.rsqrt(jnp.maximum(jnp.square(teacher).sum(-1, keepdims=True), 1e-24))
    weights = real.astype(jnp.float32)
    return Term(((1.0 - (s * t).sum(-1)) * weights).sum(), weights.sum())


def hidden_term(student: Float[Array, "L B T D"], teacher: Float[Array, "L B T D"], mask: Bool[Array, "B T"]) -> Term:
    """Squared error of the hidden states over the teacher's squared norm in this batch, per layer, mean over layers."""
    weights = mask.astype(jnp.float32)[None, :, :, None]
    error = (jnp.square(student - teacher) * weights).sum((1, 2, 3))
    size = (jnp.square(teacher) * weights).sum((1, 2, 3))
    tokens = mask.astype(jnp.float32).sum()
    return Term((error / jnp.maximum(size, 1e-12)).mean() * tokens, tokens)


def logits_term(
    student: Float[Array, "*B V"], teacher: Float[Array, "*B V"], mask: Bool[Array, "*B"], temperature: float = 1.0
) -> Term:
    """KL(teacher‖student)·τ² over the real tokens (Hinton et al. 2015)."""
    log_t = jax.nn.log_softmax(teacher / temperature, axis=-1)
    log_s = jax.nn.log_softmax(student / temperature, axis=-1)
    divergence = (jnp.exp(log_t) * (log_t - log_s)).sum(-1)
    weights = mask.astype(jnp.float32)
    return Term((divergence * weights).sum() * temperature**2, weights.sum())


def logit_error_term(student: Float[Array, "*B V"], teacher: Float[Array, "*B V"], mask: Bool[Array, "*B"]) -> Term:
    """Mean squared difference of the logits (Ba & Caruana 2014), over the real tokens."""
    weights = mask.astype(jnp.float32)
    return Term((jnp.square(student - teacher).mean(-1) * weights).sum(), weights.sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(Objective):
    """The weighted sum of the terms; a weight of 0 leaves one out.

    Attributes:
      teacher: the model to learn from; it does not change.
      cosine: weight of 1 - cosine of sentence vectors, pooled as the teacher's are.
      hidden: weight of the hidden states' error relative to the teacher's norm; both need the same width.
      layers: the teacher's layer, counted from 0, whose output each of the student's layers is to give; (): the layers
        of the same number, of as many.
      logits: weight of KL(teacher‖student) of the heads' logits, where both models have a head.
      logit_error: weight of the logits' mean squared difference.
      temperature: that the logits are divided by in the divergence.
    """

    dropout: bool = False
    teacher: Model
    cosine: float = 1.0
    hidden: float = 1.0
    logits: float = 1.0
    logit_error: float = 0.0
    temperature: float = 1.0
    layers: tuple[int, ...] = ()

    def __post_init__(self):
        weights = ("cosine", "hidden", "logits", "logit_error")
        for name in weights:
            if not getattr(self, name) >= 0:
                raise ValueError(f"distill: {name} must not be negative, got {getattr(self, name)}")
        if not any(getattr(self, name) for name in weights):
            raise ValueError(f"distill: {', '.join(weights[:-1])} and {weights[-1]} are all 0: nothing is learned")
        object.__setattr__(self, "layers", tuple(self.layers))
        if unknown := [layer for layer in self.layers if not 0 <= layer < self.teacher.config.layers]:
            raise ValueError(f"distill: the teacher has {self.teacher.config.layers} layers, and no layer {unknown[0]}")
        if not self.temperature > 0:
            raise ValueError(f"distill: temperature must be positive, got {self.temperature}")

    def split(self) -> tuple[Objective, Any]:
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "teacher"}
        pooling = self.teacher.assets.pooling or Pooling()
        return _Distill(**own, teacher=self.teacher.config, pooling=pooling), self.teacher.params


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Distill(Objective):
    """`Distill` without the teacher's arrays."""

    teacher: ModelConfig
    pooling: Pooling
    cosine: float
    hidden: float
    logits: float
    logit_error: float
    temperature: float
    layers: tuple[int, ...]

    def loss(self, run: Run, constants: Any, batch: Mapping[str, Any]) -> Terms:
        student, teacher = run.config, self.teacher
        layers = self.layers or tuple(range(teacher.layers))
        if self.hidden and (teacher.width, len(layers)) != (student.width, student.layers):
            raise ValueError(
                f"distill: {len(layers)} of the teacher's layers, of width {teacher.width}, are compared with the "
                f"student's {student.layers} of {student.width}: they cannot be; give layers, or use hidden=0"
            )
        if self.cosine and teacher.width != student.width:
            raise ValueError(
                f"distill: the teacher's vectors have width {teacher.width}, the student's {student.width}: they "
                "cannot be compared; use cosine=0"
            )
        heads = (student.head, teacher.head)
        with_logits = (self.logits > 0 or self.logit_error > 0) and "none" not in heads
        need = {"need_hidden_states": self.hidden > 0, "need_logits": with_logits}
        s = run(batch, **need)
        t = jax.lax.stop_gradient(Run(constants, teacher, run.dtype)(batch, **need))
        mask = _counted(batch, s.last_hidden_state)
        terms: Terms = {}
        if self.cosine:
            a, b = (pool(out.last_hidden_state, mask, self.pooling) for out in (s, t))
            terms["cosine"] = cosine_term(a, b, mask.any(1))._replace(scale=self.cosine)
        if self.hidden:
            a, b = (out.hidden_states[1:].astype(jnp.float32) for out in (s, t))
            b = b if not self.layers else b[jnp.asarray(self.layers)]
            terms["hidden"] = hidden_term(a, b, mask)._replace(scale=self.hidden)
        if with_logits:
            ours, theirs = (getattr(out.logits, "masked_lm", out.logits) for out in (s, t))
            if ours.shape != theirs.shape:
                raise ValueError(f"distill: the student's logits are {ours.shape}, the teacher's {theirs.shape}")
            if "label_positions" in batch:
                counted = batch["labels"] != IGNORED
            else:
                counted = mask if ours.ndim == mask.ndim + 1 else mask.any(1)
            ours, theirs = ours.astype(jnp.float32), theirs.astype(jnp.float32)
            if self.logits:
                found = logits_term(ours, theirs, counted, self.temperature)
                terms["logits"] = found._replace(scale=self.logits)
            if self.logit_error:
                terms["logit_error"] = logit_error_term(ours, theirs, counted)._replace(scale=self.logit_error)
        return terms


def _counted(batch: Mapping[str, Any], x: Float[Array, "B T D"]) -> Bool[Array, "B T"]:
    """The tokens that count: those of the decoder, where there is one, that are no padding."""
    if "packs" in batch:
        return jnp.asarray(batch["packs"]) > 0
    mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
    return jnp.ones(x.shape[:2], bool) if mask is None else jnp.asarray(mask)
