"""W = base + scale·delta: a matrix, usually one that stays as it is, and a small one that is added to its products.

A delta of low rank on a quantized base repairs what rounding lost, or is what is trained (LoRA, Hu et al. 2022; QLoRA,
Dettmers et al. 2023).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import flax.struct
import jax
import numpy as np

from flaxcompress.formats.base import (
    DenseSpec,
    Format,
    Part,
    Spec,
    attend,
    axes,
    materialize,
    matmul,
    matmul_flops,
    parse_spec,
    register,
    select,
    spec_of,
    take,
    take_flops,
)


@flax.struct.dataclass
class Adapted(Format):
    """base + scale·delta, [n, m] each, in formats of their own; `residual`: the base lacks what the delta holds."""

    base: Any
    delta: Any
    scale: float = flax.struct.field(pytree_node=False)
    residual: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def shape(self):
        return tuple(self.base.shape[-2:])

    def parts(self):
        return (Part(self.base, table=True), Part(self.delta, table=True))

    def with_parts(self, nodes):
        base, delta = nodes
        return dataclasses.replace(self, base=base, delta=delta)

    def part_targets(self, dense):
        return [dense - self.scale * np.asarray(materialize(self.delta)), None]

    def select(self, ids, axis):
        return self.with_parts([select(part.node, ids, axis) for part in self.parts()])

    def spec(self):
        return AdaptedSpec(base=spec_of(self.base), delta=spec_of(self.delta), scale=self.scale, residual=self.residual)

    def matmul(self, x):
        return matmul(x, self.base) + self.scale * matmul(x, self.delta)

    def attend(self, x):
        return attend(x, self.base) + self.scale * attend(x, self.delta)

    def take(self, ids):
        return take(self.base, ids) + self.scale * take(self.delta, ids)

    def materialize(self):
        return materialize(self.base) + self.scale * materialize(self.delta)

    def axes(self, rows, columns):
        return self.with_parts([axes(part.node, rows, columns) for part in self.parts()])

    def matmul_flops(self):
        return matmul_flops(self.base) + matmul_flops(self.delta) + 2 * self.shape[1]

    def take_flops(self):
        return take_flops(self.base) + take_flops(self.delta) + 2 * self.shape[1]


@register
@dataclasses.dataclass(frozen=True)
class AdaptedSpec(Spec):
    """The formats of the base and of what is added to it, what the latter is multiplied by, and whether it is a part.

    Attributes:
      residual: the base lacks what the delta holds: without it, it is no matrix that a model was trained with.
    """

    kind: ClassVar[str] = "adapted"
    base: Spec = dataclasses.field(default_factory=DenseSpec)
    delta: Spec = dataclasses.field(default_factory=DenseSpec)
    scale: float = 1.0
    residual: bool = False

    def __post_init__(self):
        if not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale):
            raise ValueError(f"adapted format: scale must be a finite number, got {self.scale!r}")

    @classmethod
    def parse(cls, data, where):
        parts = {name: parse_spec(data.get(name), f"{where}/{name}") for name in ("base", "delta")}
        return super().parse({**data, **parts}, where)

    def to_json(self):
        return {**super().to_json(), "base": self.base.to_json(), "delta": self.delta.to_json()}

    def init(self, key, shape, initializer, *, table):
        base_key, delta_key = jax.random.split(key)
        return Adapted(
            base=self.base.init(base_key, shape, initializer, table=table),
            delta=self.delta.init(delta_key, shape, initializer, table=table),
            scale=float(self.scale),
            residual=self.residual,
        )
