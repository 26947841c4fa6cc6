"""LoRA: a product of low rank beside each kernel, which learns while the kernel stays as it is (Hu et al. 2022).

    y = x·W + s·(x·A)·B,   A [n, R], B [R, m],   s = α/R, or α/√R where it is stabilized (rsLoRA, Kalajdzievski 2023)

With magnitudes it is DoRA (Liu et al. 2024), m [m] learning too, and ‖·‖ being the norm of each column:

    y = m ⊙ x·V/‖V‖,   V = W + s·A·B,   at first m = ‖W‖

W may be in any format: over integers this is QLoRA (Dettmers et al. 2023). PEFT's names are lora_A = Aᵀ, lora_B = Bᵀ.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress import linalg, tree
from flaxcompress.config import closest
from flaxcompress.formats import Adapted, Format, LowRank, column_norms, materialize, spec_of
from flaxcompress.model import Model, replace_matrices
from flaxcompress.nn.bases import is_on_basis
from flaxcompress.tuning.base import Tuning, register

PATTERN = r"layers/\d+/attention/(query|value)/kernel"  # what Hu et al. adapt
TRAINABLE = r".*\.(delta\..*|magnitude)"  # `fit(…, trainable=TRAINABLE)`
INITIALIZERS = ("zero", "pissa", "eva")


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(Tuning):
    """A product of low rank beside kernels; the fields are those of `with_lora`, whose "eva" needs data."""

    name: ClassVar[str] = "lora"

    rank: int = 8
    alpha: float = 16.0
    pattern: str = PATTERN
    stabilized: bool = False
    initializer: Literal["zero", "pissa"] = "zero"
    dora: bool = False

    def __post_init__(self):
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"lora: rank must be at least 1 and alpha positive, got {self.rank} and {self.alpha}")

    @property
    def trainable(self):
        return TRAINABLE

    def __call__(self, model, *, key):
        return with_lora(model, **dataclasses.asdict(self), key=key)


def with_lora(
    model: Model,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    pattern: str = PATTERN,
    stabilized: bool = False,
    initializer: str = "zero",
    dora: bool = False,
    moments: Mapping[str, Any] | None = None,
    key: jax.Array,
) -> Model:
    """The model with an adapter on every kernel that `pattern` matches; it computes the same, but for rounding.

    Args:
      rank: R.
      alpha: α.
      stabilized: s = α/√R instead of α/R.
      initializer: "zero": A uniform in ±1/√n as PEFT draws it, B zero. "pissa": A and B the first R singular components
        of W, which lacks them from then on (Meng et al. 2024), so that the adapter alone is of no use to others; W must
        be dense. "eva": the rows of Aᵀ the directions of most variance of the kernel's input, B zero (Paischer et al.
        2024).
      dora: the columns' norms are trained apart from their directions. A forward pass then multiplies W out for its
        norms, which `merged` spares.
      moments: {address of a linear map: C = E[xᵀx]}, which "eva" needs (`Calibration.input_moments`).
      key: draws A.

    Raises ValueError for settings out of range, kernels that have an adapter already or stand on a shared basis, and
    what an initializer lacks.
    """
    if initializer not in INITIALIZERS:
        raise ValueError(f"lora: unknown initializer {initializer!r}; {closest(initializer, INITIALIZERS)}")
    if not alpha > 0 or rank < 1:
        raise ValueError(f"lora: rank must be at least 1 and alpha positive, got {rank} and {alpha}")
    view = tree.View(model.params)
    kernels = [a for a in view if a.endswith("/kernel")]
    scale = float(alpha) / (math.sqrt(rank) if stabilized else rank)
    changes = {}
    for number, address in enumerate(tree.select(kernels, pattern, where="lora: pattern")):
        node = view[address]
        _check(node, address, rank)
        n, m = node.shape
        left = jax.random.uniform(jax.random.fold_in(key, number), (n, rank), minval=-1.0, maxval=1.0) / math.sqrt(n)
        right, base = jnp.zeros((rank, m)), node
        if initializer == "eva":
            left = _directions(moments, address, rank)
        if initializer == "pissa":
            if isinstance(node, Format):
                raise ValueError(f"lora: pissa takes components out of {address}, which must be dense for that")
            factors = linalg.output_pca(np.asarray(node, np.float64), rank)
            left, right = (jnp.asarray(f / math.sqrt(scale), jnp.float32) for f in _balanced(factors))
            base = (node - scale * jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)).astype(node.dtype)
        delta = LowRank(left=left, right=right)
        whole = Adapted(base=base, delta=delta, scale=scale, residual=initializer == "pissa")
        changes[address] = dataclasses.replace(whole, magnitude=column_norms(materialize(whole))) if dora else whole
    return replace_matrices(model, changes)


def merged(model: Model) -> Model:
    """The model with every adapter added to its kernel; kernels in other formats become dense float32."""
    changes = {}
    for address, node in tree.View(model.params).items():
        if isinstance(node, Adapted):
            whole = materialize(node)
            changes[address] = whole if isinstance(node.base, Format) else whole.astype(node.base.dtype)
    return replace_matrices(model, changes) if changes else model


def without_lora(model: Model) -> Model:
    """The model without its adapters: the kernels as they were, but for those of "pissa"."""
    view = tree.View(model.params)
    changes = {address: node.base for address, node in view.items() if isinstance(node, Adapted)}
    return replace_matrices(model, changes) if changes else model


def adapters(model: Model) -> dict[str, Adapted]:
    """{address: kernel with its adapter}."""
    return {address: node for address, node in tree.View(model.params).items() if isinstance(node, Adapted)}


def _check(node: Any, address: str, rank: int) -> None:
    if isinstance(node, Adapted):
        raise ValueError(f"lora: {address} has an adapter already; merge it, or leave the kernel out")
    if is_on_basis(node):
        raise ValueError(f"lora: {address} stands on a basis that layers share; leave it out")
    if rank > min(node.shape):
        n, m = node.shape
        raise ValueError(f"lora: rank {rank} is not in 1 … {min(n, m)} for {address}, {n}×{m} as {spec_of(node).kind}")


def _directions(moments: Mapping[str, Any] | None, address: str, rank: int) -> jax.Array:
    if moments is None or (moment := moments.get(re.sub("/kernel$", "", address))) is None:
        raise ValueError(f"lora: eva needs moments= of the input of {address} (Calibration.input_moments)")
    _, vectors = np.linalg.eigh(np.asarray(moment, np.float64))
    return jnp.asarray(vectors[:, ::-1][:, :rank].copy(), jnp.float32)


def _balanced(factors: linalg.Factors) -> tuple[np.ndarray, np.ndarray]:
    """The factors with singular values' roots on both sides."""
    root = np.sqrt(np.maximum(np.linalg.norm(factors.left, axis=0), 1e-30))
    return factors.left / root, factors.right * root[:, None]
