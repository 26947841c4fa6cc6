"""What each kernel may become, and what each of it is predicted to cost: bits, or a low rank in bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flaxcompress import linalg
from flaxcompress.compress.rounding import gptq, round_rows
from flaxcompress.formats import LowRank, QuantizedSpec, break_even_rank, matmul_flops, nbytes
from flaxcompress.formats.quantized import Quantized, spread_scale

_HALVING = 0.25  # what one bit more leaves of the squared error


@dataclasses.dataclass(frozen=True)
class Offer:
    """A way to store a kernel.

    Attributes:
      kind: "bits", "rank" or "dense".
      bits: of the kernel, or of both factors; None: float32.
      rank: R, or None for the whole kernel.
      bytes: that it takes.
      flops: per token.
      loss: that it is predicted to cost (see `Answers`).
    """

    kind: str
    bits: int | None
    rank: int | None
    bytes: int
    flops: int
    loss: float

    @property
    def label(self) -> str:
        """For people: "3 bits", "rank 96 in 4 bits", "rank 96", "dense"."""
        within = "" if self.bits is None else f"{self.bits} bits"
        if self.rank is None:
            return within or "dense"
        return f"rank {self.rank} in {within}" if within else f"rank {self.rank}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Menu:
    """What is offered for each kernel.

    Attributes:
      bits: of whole kernels; None for float32.
      ranks: fractions of a kernel's break-even rank, at which factors are as large as the kernel.
      factor_bits: of low-rank factors; None for float32.
      group: neighbouring inputs that share one scale.
      scale_dtype: of the scales.
    """

    bits: tuple[int | None, ...] = (2, 3, 4, 8)
    ranks: tuple[float, ...] = (0.2, 0.35, 0.5, 0.7)
    factor_bits: tuple[int | None, ...] = (3, 4, 8)
    group: int | None = 64
    scale_dtype: str = "float16"

    def spec(self, bits: int) -> QuantizedSpec:
        """The format of a matrix in so many bits."""
        return QuantizedSpec(bits=bits, group=self.group, scale_dtype=self.scale_dtype)


@dataclasses.dataclass(frozen=True)
class Priced:
    """A kernel's moments, and the scale from its Kronecker-factored loss to the loss of the answers.

    Attributes:
      inputs: C = E[xᵀx], [n, n].
      gradients: G = E[gᵀg] of its output, [m, m].
      scale: what tr(ΔᵀCΔG)/2 is multiplied by: the answer's tokens, times what measuring says.
    """

    inputs: Float[np.ndarray, "n n"]
    gradients: Float[np.ndarray, "m m"]
    scale: float = 1.0

    def loss(self, change: Float[Array, "n m"]) -> float:
        """The predicted loss of a changed kernel, W + Δ (K-FAC, Martens & Grosse 2015)."""
        return self.scale * float(_quadratic(jnp.asarray(change), self.inputs, self.gradients))


@jax.jit
def _quadratic(change: Any, inputs: Any, gradients: Any) -> Any:
    inner = jnp.matmul(inputs, change, precision=jax.lax.Precision.HIGHEST)
    outer = jnp.matmul(change, gradients, precision=jax.lax.Precision.HIGHEST)
    return 0.5 * (inner * outer).sum()


def offers_of(weight: Float[np.ndarray, "n m"], priced: Priced, menu: Menu) -> list[Offer]:
    """Every way of the menu to store a kernel, priced; no two of equal cost, none that costs more for no less loss.

    Whole kernels are rounded by GPTQ, as `Quantize` will; with each bit above 4 the loss falls to a quarter. Low ranks
    are cut in the two-sided metric of `linalg.kronecker_svd`, their factors rounded one after the other.
    """
    n, m = weight.shape
    found: list[Offer] = []
    w = jnp.asarray(weight, jnp.float32)
    losses: dict[int, float] = {}
    for bits in sorted({min(b, 4) for b in menu.bits if b is not None}):
        losses[bits] = priced.loss(_rounded(w, menu.spec(bits), priced.inputs) - w)
    for bits in menu.bits:
        if bits is None:
            found.append(Offer("dense", None, None, 4 * n * m, 2 * n * m, 0.0))
        else:
            loss = losses[min(bits, 4)] * _HALVING ** max(0, bits - 4)
            size = quantized_bytes((n, m), menu.spec(bits))
            found.append(Offer("bits", bits, None, size, 2 * n * m, loss))
    if menu.ranks:
        found += _low_ranks(w, priced, menu)
    return undominated(found)


def _low_ranks(w: Float[Array, "n m"], priced: Priced, menu: Menu) -> list[Offer]:
    n, m = w.shape
    limit = break_even_rank(n, m)
    ranks = sorted({max(1, round(fraction * limit)) for fraction in menu.ranks})
    factors = linalg.kronecker_svd(np.asarray(w), min(n, m), priced.inputs, priced.gradients)
    found = []
    for rank in ranks:
        left, right = (jnp.asarray(f, jnp.float32) for f in (factors.left[:, :rank], factors.right[:rank]))
        for bits in menu.factor_bits:
            if bits is None:
                node = LowRank(left=left, right=right)
                change = left @ right - w
            else:
                spec = menu.spec(bits)
                rounded = _rounded(left, spec, priced.inputs)
                inner = rounded.T @ jnp.asarray(priced.inputs, jnp.float32) @ rounded
                change = rounded @ _rounded(right, spec, inner) - w
                node = jax.eval_shape(lambda l=left, r=right, s=spec: LowRank(left=_node(l, s), right=_node(r, s)))
            found.append(Offer("rank", bits, rank, nbytes(node), matmul_flops(node), priced.loss(change)))
    return found


def _node(weight: Any, spec: QuantizedSpec) -> Quantized:
    zeros: Any = lambda key, size, dtype: jnp.zeros(size, dtype)  # noqa: E731
    return spec.init(jax.random.key(0), weight.shape, zeros, table=False)


def quantized_bytes(shape: tuple[int, int], spec: QuantizedSpec) -> int:
    """Bytes of a kernel [n, m] in a quantized format."""
    return shape[1] * spec.row_bytes(shape[0])


def _rounded(weight: Float[Array, "n m"], spec: QuantizedSpec, moments: Any) -> Float[Array, "n m"]:
    """The kernel as it is after rounding, dense."""
    if spec.bits > 4:
        levels, scale = round_rows(weight.T, spec, weights=jnp.diagonal(jnp.asarray(moments)))
    else:
        levels, scale = gptq(weight.T, jnp.asarray(moments), spec)
    return (levels * spread_scale(scale, weight.shape[0], spec.group)).T


def undominated(offers: Sequence[Offer], cost: str = "bytes") -> list[Offer]:
    """Those that no other beats in cost without losing more, from the cheapest to the dearest."""
    kept, least = [], np.inf
    for offer in sorted(offers, key=lambda o: (getattr(o, cost), o.loss)):
        if offer.loss < least:
            kept.append(offer)
            least = offer.loss
    return kept


def by_label(offers: Mapping[str, Sequence[Offer]], value: str) -> dict[str, dict[str, Any]]:
    """{address: {label: bytes, flops or loss}}, as `choices` wants it."""
    return {address: {o.label: getattr(o, value) for o in found} for address, found in offers.items()}
