"""Healing: the compressed model learns from the original on unlabelled text."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.config import ModelConfig
from flaxcompress.data.stream import FragmentStream
from flaxcompress.encoding import compute_dtype, pool
from flaxcompress.model import Model
from flaxcompress.nn import Transformer
from flaxcompress.nn.remat import check_remat
from flaxcompress.text import Pooling
from flaxcompress.train import Rates, freeze_model, make_optimizer, thaw_model, train
from flaxcompress.train.objectives import cosine_loss, hidden_loss, logits_loss


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class Heal(Step):
    """Distils the original into the compressed model; formats stay, values change.

    Integer matrices are trained through rounding: float latents with straight-through gradients and learned scales (see
    `formats.fake_quantized`), frozen again at the end.

    Attributes:
      steps: optimizer steps.
      batch: texts per step: sentences and fragments of the calibration text.
      max_length: tokens per text at most.
      cosine, hidden, logits: weights of the loss terms: 1 - cosine of sentence vectors, hidden-state error relative to
        the teacher's norm (mean over layers), and KL of masked-LM logits where both models have the head.
      weights, scales, vectors: learning rates (see `Rates`).
      warmup: steps of linear warm-up before the cosine decay.
      weight_decay: of matrices, relative to their size like their rate (decoupled, as in AdamW).
      clip: largest global norm of the gradient.
      save_every: steps between checkpoints.
      remat: what the backward pass computes again to save memory: "none", "dots" (all but products with weights) or
        "full" (all but each layer's input).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})

    steps: int = 300
    batch: int = 32
    max_length: int = 64
    cosine: float = 1.0
    hidden: float = 1.0
    logits: float = 1.0
    weights: float = 6e-3
    scales: float = 3e-3
    vectors: float = 3e-4
    warmup: int = 20
    weight_decay: float = 0.0
    clip: float = 1.0
    save_every: int = 100
    remat: Literal["none", "full", "dots"] = "none"

    def __post_init__(self):
        for name in ("batch", "max_length", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"Heal: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("cosine", "hidden", "logits", "weights", "scales", "vectors", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"Heal: {name} must not be negative, got {getattr(self, name)}")
        if not self.clip > 0:
            raise ValueError(f"Heal: clip must be positive, got {self.clip}")
        if not (self.cosine or self.hidden or self.logits):
            raise ValueError("Heal: cosine, hidden and logits are all 0, so there is nothing to learn")
        check_remat(self.remat)
        if self.steps < 0 or self.warmup < 0:
            raise ValueError(f"Heal: steps and warmup must not be negative, got {self.steps} and {self.warmup}")

    def plan(self, config: ModelConfig) -> ModelConfig:
        return config

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        if self.steps == 0:
            return model
        teacher = context.original
        if teacher.config.width != model.config.width or teacher.config.layers != model.config.layers:
            raise ValueError(
                f"Heal: the original is {teacher.config.layers} layers of width {teacher.config.width}, the compressed "
                f"model {model.config.layers} of {model.config.width}: hidden states cannot be compared"
            )
        seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
        stream = FragmentStream(
            context.need(self).rows,
            batch=self.batch,
            pad=model.config.pad_token,
            seed=seed,
            max_length=min(self.max_length, model.config.positions),
        )
        optimizer = make_optimizer(
            Rates(weights=self.weights, scales=self.scales, vectors=self.vectors),
            steps=self.steps,
            warmup=self.warmup,
            clip=self.clip,
            weight_decay=self.weight_decay,
        )
        loss = functools.partial(
            distillation_loss,
            student=model.config,
            teacher=teacher.config,
            pooling=teacher.assets.pooling or Pooling(),
            step=self,
        )
        trained = train(
            thaw_model(model, teacher),
            loss,
            teacher.params,
            stream,
            optimizer=optimizer,
            steps=self.steps,
            checkpoints=None if context.work is None else context.work / "heal",
            save_every=self.save_every,
            label="healing",
            progress=context.progress,
            on_loss=lambda number, value: context.healing.append({"step": number + 1, "loss": value}),
        )
        return freeze_model(trained, model)


def distillation_loss(
    params: Any,
    teacher_params: Any,
    batch: Any,
    *,
    student: ModelConfig,
    teacher: ModelConfig,
    pooling: Pooling,
    step: Heal,
) -> jax.Array:
    """The weighted sum of `Heal`'s loss terms on one batch (ids, mask)."""
    ids, mask = batch
    mask = jnp.asarray(mask)
    dtype = compute_dtype()
    with_logits = step.logits > 0 and all(c.head in ("masked_lm", "pretraining") for c in (student, teacher))

    def run(config: ModelConfig, values: Any, remat: str = "none") -> Any:
        need = {"need_hidden_states": True, "need_logits": with_logits, "remat": remat}
        return Transformer(config, dtype).apply({"params": values}, ids, mask, **need)

    s = run(student, params, step.remat)
    t = jax.lax.stop_gradient(run(teacher, teacher_params))
    total = jnp.zeros(())
    if step.cosine:
        total += step.cosine * cosine_loss(
            pool(s.last_hidden_state, mask, pooling), pool(t.last_hidden_state, mask, pooling), mask.any(1)
        )
    if step.hidden:
        total += step.hidden * hidden_loss(
            s.hidden_states[1:].astype(jnp.float32), t.hidden_states[1:].astype(jnp.float32), mask
        )
    if with_logits:
        ours, theirs = (getattr(out.logits, "masked_lm", out.logits) for out in (s, t))
        total += step.logits * logits_loss(ours, theirs, mask)
    return total
