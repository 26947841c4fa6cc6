"""A left factor that stands elsewhere: the basis of a low-rank kernel, stored once for the layers that share it.

    {"kind": "low_rank", "rank": 40, "left": {"kind": "basis"}}

Such a kernel holds its right factor alone, the layer's coefficients; `nn/bases.py` puts the basis in its place before
the layer runs.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.struct

from flaxcompress.formats.base import Format, Spec, register


@flax.struct.dataclass
class Basis(Format):
    """The place of a basis [n, R]; it holds no values."""

    rows: int = flax.struct.field(pytree_node=False)
    rank: int = flax.struct.field(pytree_node=False)

    @property
    def shape(self):
        return (self.rows, self.rank)

    def spec(self):
        return BasisSpec()

    def axes(self, rows, columns):
        return self

    def matmul(self, x):
        raise _missing()

    def attend(self, x):
        raise _missing()

    def take(self, ids):
        raise _missing()

    def materialize(self):
        raise _missing()

    def select(self, ids, axis):
        raise _missing()


def _missing() -> ValueError:
    return ValueError(
        "a kernel on a basis that layers share has no values of its own: let this step come before ShareBasis; a "
        "format written by hand needs a map of bases in sharing"
    )


@register
@dataclasses.dataclass(frozen=True)
class BasisSpec(Spec):
    """Only the left factor of a kernel in a layer may be so."""

    kind: ClassVar[str] = "basis"

    def init(self, key, shape, initializer, *, table):
        return Basis(rows=shape[0], rank=shape[1])
