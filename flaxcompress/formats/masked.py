"""What sparse formats have in common: rows of which some entries are kept, and the form that training changes.

A sparse matrix knows its rows and which of their entries it keeps. Training holds the rows dense, `Masked`: no gradient
passes a zero, and no gather or scatter slows a step down. `freeze` packs them again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool

from flaxcompress.formats.base import DenseSpec, Format, Part, Spec, parse_spec
from flaxcompress.formats.rows import RowFormat, TrainingForm
from flaxcompress.ops import pack, unpack


class MaskedRows(RowFormat):
    """Rows of which some entries are stored: `values` is the matrix of those, dense or quantized."""

    values: Any

    def parts(self):
        return (Part(self.values, table=True),)

    def with_parts(self, nodes):
        return dataclasses.replace(self, values=nodes[0])  # pyright: ignore[reportArgumentType, reportCallIssue]

    def kept_entries(self) -> Bool[Array, "r n"]:
        """Which entries of the rows are stored."""
        raise NotImplementedError(f"{type(self).__name__}.kept_entries")

    def chosen(self, ids):
        raise ValueError(f"{type(self).__name__}: some of a pruned matrix's rows; cut first, and prune what is left")


@dataclasses.dataclass(frozen=True)
class MaskedSpec(Spec):
    """The spec of a sparse format; the matrix of the values that are kept is dense or quantized."""

    values: Spec = dataclasses.field(default_factory=DenseSpec, kw_only=True)

    def __post_init__(self):
        if self.values.kind not in ("dense", "quantized"):
            raise ValueError(f"{self.kind} format: values are dense or quantized, got {self.values.kind!r}")

    @classmethod
    def parse(cls, data, where):
        values = parse_spec(data.get("values"), f"{where}/values")
        return super().parse({**data, "values": values}, where)

    def to_json(self):
        return {**super().to_json(), "values": self.values.to_json()}

    @property
    def values_dtype(self) -> str:
        """How dense values are stored."""
        return self.values.dtype if isinstance(self.values, DenseSpec) else "float32"

    def pack(self, rows: Any, kept: Any, *, transposed: bool) -> MaskedRows:
        """The entries of rows [r, n] that `kept` [r, n] marks, as many as the spec says; values are stored dense.

        Both are of numpy or both of JAX.
        """
        raise NotImplementedError(f"{type(self).__name__}.pack")


@flax.struct.dataclass
class Masked(TrainingForm):
    """`latent` [rows, n] float32, of which the entries in `mask` [rows, ⌈n/8⌉] (bits) count."""

    latent: Any
    mask: Any
    target: MaskedSpec = flax.struct.field(pytree_node=False)
    transposed: bool = flax.struct.field(pytree_node=False)

    def axes(self, rows, columns):
        stored, along = self.stored_axes(rows, columns)
        return dataclasses.replace(self, latent=PartitionSpec(stored, along), mask=PartitionSpec(stored, None))

    def spec(self):
        return self.target

    def _decode(self, latent, mask):
        return jnp.where(unpack(mask, 1, latent.shape[-1]).astype(bool), latent, 0.0)

    def rows(self):
        return self._decode(self.latent, self.mask)

    def take_rows(self, ids):
        parts = (self.latent, self.mask)
        return self._decode(*(jnp.take(part, ids, axis=0, mode="clip") for part in parts))

    def freeze(self) -> MaskedRows:
        """The packed format of the same values."""
        latent = np.asarray(self.latent)
        kept = np.asarray(unpack(self.mask, 1, latent.shape[-1])).astype(bool)
        return self.target.pack(latent, kept, transposed=self.transposed)


def unpacked(node: MaskedRows) -> Format:
    """The trainable form of a sparse matrix whose values are dense: it computes what `node` does."""
    spec = node.spec()
    assert isinstance(spec, MaskedSpec)
    rows, kept = node.rows(), node.kept_entries()
    return Masked(latent=rows, mask=pack(kept, 1), target=spec, transposed=node.transposed)
