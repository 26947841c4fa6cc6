"""Which of the teacher's layers each of the student's layers learns from."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxcompress.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """Settings of the terms that compare layers.

    Attributes:
      layers: the teacher's layer, counted from 0, whose output each of the student's layers is to give; (): the layers
        of the same number, of as many.
    """

    layers: tuple[int, ...] = ()


def check_layers(layers: tuple[int, ...], teacher: ModelConfig) -> None:
    """Raises ValueError for layers that the teacher does not have."""
    if unknown := [layer for layer in layers if not 0 <= layer < teacher.layers]:
        raise ValueError(f"distill: the teacher has {teacher.layers} layers, and no layer {unknown[0]}")


def layers_match(settings: Any, student: ModelConfig, teacher: ModelConfig) -> bool:
    """Whether every layer of the student has one of the teacher's to learn from."""
    return len(settings.layers or range(teacher.layers)) == student.layers


def of_layers(settings: Any, found: Float[Array, "L B ..."]) -> Float[Array, "l B ..."]:
    """What the teacher's layers made, one entry for each of the student's."""
    return found[jnp.asarray(settings.layers)] if settings.layers else found
