"""W = base + scale·delta: a matrix, usually one that stays as it is, and a small one that is added to its products.

A delta of low rank on a quantized base repairs what rounding lost, or is what is trained (LoRA, Hu et al. 2022; QLoRA,
Dettmers et al. 2023). With magnitudes m it is DoRA (Liu et al. 2024, eq. 5), ‖·‖ being the norm of each column:

    W = m ⊙ V/‖V‖,   V = base + scale·delta
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

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
    """base + scale·delta, [n, m] each, in formats of their own; `residual`: the base lacks what the delta holds.

    `magnitude`, [m], are the columns' norms where these are trained apart from their directions; None: they are not.
    """

    base: Any
    delta: Any
    scale: float = flax.struct.field(pytree_node=False)
    residual: bool = flax.struct.field(pytree_node=False, default=False)
    magnitude: Any = None

    @property
    def shape(self):
        return tuple(self.base.shape[-2:])

    def gain(self, direction: Any = None) -> Float[Array, " m"] | None:
        """m/‖V‖, by which columns are multiplied; None without magnitudes. ‖V‖ has no gradient (Liu et al. §4.3)."""
        if self.magnitude is None:
            return None
        norm = column_norms(self._direction() if direction is None else direction)
        return self.magnitude / jax.lax.stop_gradient(jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))

    def _direction(self) -> Float[Array, "n m"]:
        return materialize(self.base) + self.scale * materialize(self.delta)

    def parts(self):
        return (Part(self.base, table=True), Part(self.delta, table=True))

    def with_parts(self, nodes):
        base, delta = nodes
        return dataclasses.replace(self, base=base, delta=delta)

    def part_targets(self, dense):
        if self.magnitude is not None:
            return [None, None]
        return [dense - self.scale * np.asarray(materialize(self.delta)), None]

    def select(self, ids, axis):
        chosen = self.with_parts([select(part.node, ids, axis) for part in self.parts()])
        if (gain := self.gain()) is None:
            return chosen
        kept = jnp.take(gain, ids) if axis == 1 else gain  # fewer rows have other norms, and the same gain
        return dataclasses.replace(chosen, magnitude=kept * column_norms(chosen._direction()))

    def spec(self):
        return AdaptedSpec(
            base=spec_of(self.base),
            delta=spec_of(self.delta),
            scale=self.scale,
            residual=self.residual,
            magnitude=self.magnitude is not None,
        )

    def matmul(self, x):
        return self._scaled(matmul(x, self.base) + self.scale * matmul(x, self.delta))

    def attend(self, x):
        x = self._scaled(x)
        return attend(x, self.base) + self.scale * attend(x, self.delta)

    def take(self, ids):
        return self._scaled(take(self.base, ids) + self.scale * take(self.delta, ids))

    def materialize(self):
        whole = self._direction()
        return whole if (gain := self.gain(whole)) is None else whole * gain

    def _scaled(self, y: Float[Array, "*B m"]) -> Float[Array, "*B m"]:
        return y if (gain := self.gain()) is None else y * gain.astype(y.dtype)

    def axes(self, rows, columns):
        cut = self.with_parts([axes(part.node, rows, columns) for part in self.parts()])
        return cut if self.magnitude is None else dataclasses.replace(cut, magnitude=PartitionSpec(columns))

    def matmul_flops(self):
        return matmul_flops(self.base) + matmul_flops(self.delta) + 2 * self.shape[1]

    def take_flops(self):
        return take_flops(self.base) + take_flops(self.delta) + 2 * self.shape[1]


def column_norms(w: Float[Array, "n m"]) -> Float[Array, " m"]:
    """The Euclidean norm of every column."""
    return jnp.sqrt(jnp.sum(w * w, axis=0))


@register
@dataclasses.dataclass(frozen=True)
class AdaptedSpec(Spec):
    """The formats of the base and of what is added to it, what the latter is multiplied by, and whether it is a part.

    Attributes:
      residual: the base lacks what the delta holds: without it, it is no matrix that a model was trained with.
      magnitude: whether the columns' norms are stored apart (DoRA).
    """

    kind: ClassVar[str] = "adapted"
    base: Spec = dataclasses.field(default_factory=DenseSpec)
    delta: Spec = dataclasses.field(default_factory=DenseSpec)
    scale: float = 1.0
    residual: bool = False
    magnitude: bool = False

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
        node = Adapted(
            base=self.base.init(base_key, shape, initializer, table=table),
            delta=self.delta.init(delta_key, shape, initializer, table=table),
            scale=float(self.scale),
            residual=self.residual,
        )
        return dataclasses.replace(node, magnitude=column_norms(node.materialize())) if self.magnitude else node
