"""What each kernel may become, and what each of it is predicted to cost: bits, or a low rank in bits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flaxcompress import linalg
from flaxcompress.compress.rounding import gptq, round_rows
from flaxcompress.formats import QuantizedSpec, break_even_rank
from flaxcompress.formats.scaled import spread_scale

_NAME = 230  # bytes of the file's header that a tensor takes at most: name, shape, place, checksum
_QUARTER = 0.25  # what one bit more leaves of the squared error


@dataclasses.dataclass(frozen=True)
class Offer:
    """A way to store a kernel.

    Attributes:
      kind: "bits", "rank" or "dense".
      bits: of the kernel, or of both factors; None: float32.
      rank: R, or None for the whole kernel.
      group: neighbouring inputs that share one scale; None: all.
      bytes: that it takes.
      flops: per token.
      loss: that it is predicted to cost (see `Answers`).
    """

    kind: str
    bits: int | None
    rank: int | None
    group: int | None
    bytes: int
    flops: int
    loss: float

    @property
    def label(self) -> str:
        """For people: "8 bits", "3 bits in groups of 64", "rank 96 in 4 bits", "rank 96", "dense"."""
        if self.rank is not None:
            return f"rank {self.rank}" + ("" if self.bits is None else f" in {self.bits} bits")
        if self.bits is None:
            return "dense"
        return f"{self.bits} bits" + ("" if self.group is None else f" in groups of {self.group}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Menu:
    """What is offered for each kernel.

    Attributes:
      bits: of whole kernels; None for float32.
      groups: neighbouring inputs of whole kernels that may share one scale; None: all.
      ranks: fractions of a kernel's break-even rank, at which factors are as large as the kernel.
      factor_bits: of low-rank factors; None for float32.
      factor_group: neighbouring inputs of factors that share one scale.
      scale_dtype: of the scales.
    """

    bits: tuple[int | None, ...] = (2, 3, 4, 5, 6, 8)
    groups: tuple[int | None, ...] = (32, 64, 128, None)
    ranks: tuple[float, ...] = (0.2, 0.35, 0.5, 0.7)
    factor_bits: tuple[int | None, ...] = (3, 4, 8)
    factor_group: int | None = 64
    scale_dtype: str = "float16"

    def spec(self, bits: int, group: int | None) -> QuantizedSpec:
        """The format of a matrix in so many bits."""
        return QuantizedSpec(bits=bits, group=group, scale_dtype=self.scale_dtype)


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

    def loss(self, change: Any) -> float:
        """The predicted loss of a changed kernel, W + Δ with Δ [n, m] (K-FAC, Martens & Grosse 2015)."""
        return self.scale * float(_quadratic(jnp.asarray(change), self.inputs, self.gradients))


@jax.jit
def _quadratic(change: Any, inputs: Any, gradients: Any) -> Any:
    inner = jnp.matmul(inputs, change, precision=jax.lax.Precision.HIGHEST)
    outer = jnp.matmul(change, gradients, precision=jax.lax.Precision.HIGHEST)
    return 0.5 * (inner * outer).sum()


def ways_of(shape: tuple[int, int], menu: Menu) -> list[Offer]:
    """Every way of the menu to store a kernel [n, m], without its loss (nan)."""
    n, m = shape
    found = []
    groups = dict.fromkeys(group if group is not None and group < n else None for group in menu.groups)
    for bits in menu.bits:
        if bits is None:
            found.append(Offer("dense", None, None, None, 4 * n * m + _NAME, 2 * n * m, np.nan))
            continue
        for group in groups:
            size = m * menu.spec(bits, group).row_bytes(n) + 2 * _NAME
            found.append(Offer("bits", bits, None, group, size, 2 * n * m, np.nan))
    limit = break_even_rank(n, m)
    for rank in sorted({max(1, round(fraction * limit)) for fraction in menu.ranks}):
        for bits in menu.factor_bits:
            group = None if bits is None else menu.factor_group
            if bits is None:
                size = 4 * rank * (n + m) + 2 * _NAME
            else:
                spec = menu.spec(bits, group)
                size = rank * spec.row_bytes(n) + m * spec.row_bytes(rank) + 4 * _NAME
            found.append(Offer("rank", bits, rank, group, size, 2 * rank * (n + m), np.nan))
    return found


def offers_of(weight: Float[np.ndarray, "n m"], priced: Priced, menu: Menu) -> list[Offer]:
    """Every way of the menu to store a kernel, priced.

    Whole kernels are rounded by GPTQ, as `Quantize` will; with each bit above 4 the loss falls to a quarter. Low ranks
    are cut in the two-sided metric of `linalg.kronecker_svd`, their factors rounded one after the other.
    """
    w = jnp.asarray(weight, jnp.float32)
    inputs = jnp.asarray(priced.inputs, jnp.float32)
    ways = ways_of((w.shape[0], w.shape[1]), menu)
    factors = None
    if any(way.rank is not None for way in ways):
        factors = linalg.kronecker_svd(weight, min(w.shape), priced.inputs, priced.gradients)

    @functools.cache
    def whole(bits: int, group: int | None) -> float:
        return priced.loss(_rounded(w, menu.spec(bits, group), inputs) - w)

    def loss(way: Offer) -> float:
        if way.rank is None:
            if way.bits is None:
                return 0.0
            return whole(min(way.bits, 4), way.group) * _QUARTER ** max(0, way.bits - 4)
        assert factors is not None
        left, right = (jnp.asarray(f, jnp.float32) for f in (factors.left[:, : way.rank], factors.right[: way.rank]))
        if way.bits is not None:
            left = _rounded(left, menu.spec(way.bits, way.group), inputs)
            right = _rounded(right, menu.spec(way.bits, way.group), left.T @ inputs @ left)
        return priced.loss(left @ right - w)

    return [dataclasses.replace(way, loss=loss(way)) for way in ways]


def _rounded(weight: Float[Array, "n m"], spec: QuantizedSpec, moments: Any) -> Float[Array, "n m"]:
    """The kernel as it is after rounding, dense."""
    if spec.bits > 4:
        levels, scale = round_rows(weight.T, spec, weights=jnp.diagonal(jnp.asarray(moments)))
    else:
        levels, scale = gptq(weight.T, jnp.asarray(moments), spec)
    return (levels * spread_scale(scale, weight.shape[0], spec.group)).T


def undominated(
    offers: Sequence[Offer], cost: str = "bytes", loss: Callable[[Offer], float] = lambda offer: offer.loss
) -> list[Offer]:
    """Those that no other beats in cost without losing more, from the cheapest to the dearest."""
    kept, least = [], np.inf
    for offer in sorted(offers, key=lambda o: (getattr(o, cost), loss(o))):
        if loss(offer) < least:
            kept.append(offer)
            least = loss(offer)
    return kept
