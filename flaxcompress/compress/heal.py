"""Healing: the compressed model learns from the original on unlabelled text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax

from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.config import ModelConfig
from flaxcompress.data.batches import StepBatches
from flaxcompress.data.stream import FragmentStream
from flaxcompress.model import Model
from flaxcompress.nn.remat import check_remat
from flaxcompress.train import Distill, Memory, Rates, fit, make_optimizer
from flaxcompress.train.objectives.terms import Settings, check_settings, values_of


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class Heal(Settings, Step):
    """Distils the original into the compressed model; formats stay, values change.

    Integer matrices are trained through rounding: float latents with straight-through gradients and learned scales (see
    `formats.fake_quantized`), frozen again at the end.

    Attributes:
      steps: optimizer steps.
      batch: texts per step: sentences and fragments of the calibration text.
      max_length: tokens per text at most.
      cosine, hidden, logits, relations, …: weights of the loss terms, and what else they have to set: each is described
        where its term is (`train/objectives/terms/`). A model that was made narrower heals by relations.
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
    weights: float = 6e-3
    scales: float = 3e-3
    vectors: float = 3e-4
    warmup: int = 20
    weight_decay: float = 0.0
    clip: float = 1.0
    save_every: int = 100
    remat: Literal["none", "full", "dots"] = "dots"

    def __post_init__(self):
        for name in ("batch", "max_length", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"Heal: {name} must be at least 1, got {getattr(self, name)}")
        check_settings(self, self.name)
        if self.hard:
            raise ValueError("Heal: calibration text has no labels; leave hard out, or train with the task's data")
        for name in ("weights", "scales", "vectors", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"Heal: {name} must not be negative, got {getattr(self, name)}")
        if not self.clip > 0:
            raise ValueError(f"Heal: clip must be positive, got {self.clip}")
        check_remat(self.remat)
        if self.steps < 0 or self.warmup < 0:
            raise ValueError(f"Heal: steps and warmup must not be negative, got {self.steps} and {self.warmup}")

    def plan(self, config: ModelConfig) -> ModelConfig:
        return config

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        if self.steps == 0:
            return model
        teacher = context.original
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
        known = tuple(context.layers) if len(context.layers) == model.config.layers else ()
        losses = context.healing

        def watch(done: int, values: Mapping[str, float]) -> None:
            losses.append({"step": done, "loss": values["loss"]})

        def recall(kept: dict[str, Any]) -> None:
            losses[:] = [{"step": number + 1, "loss": value} for number, value in enumerate(kept["losses"])]

        def batch(number: int) -> dict[str, Any]:
            ids, mask = stream(number)
            return {"input_ids": ids, "attention_mask": mask}

        return fit(
            model,
            Distill(
                teacher=teacher,
                **{**values_of(self), "layers": self.layers or known},
            ),
            StepBatches(batch),
            steps=self.steps,
            key=key,
            mesh=context.mesh,
            out=None if context.work is None else context.work / "heal",
            optimizer=optimizer,
            original=teacher,
            remat=self.remat,
            save_every=self.save_every,
            watch=watch,
            memory=Memory(lambda: {"losses": [entry["loss"] for entry in losses]}, recall),
            label="healing",
            progress=context.progress,
        )
