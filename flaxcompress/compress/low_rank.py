"""Low-rank kernels: truncated SVD, plain, whitened by the inputs, or weighted by Fisher information."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress import linalg, tree
from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.config import ModelConfig
from flaxcompress.formats import LowRank as LowRankFormat
from flaxcompress.formats import LowRankSpec, materialize, rank_for
from flaxcompress.model import Model, abstract_flat, replace_matrices

Whitening = Literal["activation", "none", "fisher"]


def compress_matrix(
    weight: np.ndarray, rank: int, *, moments: np.ndarray | None = None, fisher: np.ndarray | None = None
) -> tuple[LowRankFormat, np.ndarray]:
    """The rank-R format of a kernel [n, m] and its spectrum.

    Args:
      moments: C = E[xᵀx], [n, n]; the factors then minimise the output's error E‖x(W - AB)‖² (see `output_pca`).
      fisher: squared gradients [n, m]; their row and column means weight the error (FWSVD).
    """
    if fisher is not None:
        factors = linalg.two_sided_svd(weight, rank, fisher.mean(1), fisher.mean(0))
    else:
        factors = linalg.output_pca(weight, rank, moments)
    node = LowRankFormat(left=jnp.asarray(factors.left, jnp.float32), right=jnp.asarray(factors.right, jnp.float32))
    return node, factors.spectrum


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(Step):
    """Replaces every kernel that `pattern` matches by a product of two factors.

    Attributes:
      pattern: full-match address pattern, e.g. "layers/\\d+/feed_forward/.*/kernel".
      rank: R, or
      keep: the fraction of the matrix's parameters that the factors may hold.
      whitening: "activation" minimises the output's error on calibration text (SVD-LLM in its output-PCA form),
        "fisher" weights the error by squared gradients (FWSVD), "none" is the plain truncated SVD.
      allow_larger: accept ranks at which the factors are larger than the matrix.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_moments"})

    pattern: str = dataclasses.field(kw_only=False)
    rank: int | None = None
    keep: float | None = None
    whitening: Whitening = "activation"
    allow_larger: bool = False

    def _ranks(self, flat: Mapping[str, Any]) -> dict[str, int]:
        kernels = [a for a in flat if a.endswith("/kernel")]
        found = tree.select(kernels, self.pattern, where="LowRank/pattern")
        return {a: rank_for(flat[a].shape, self.rank, self.keep, self.allow_larger, a) for a in found}

    def plan(self, config: ModelConfig) -> ModelConfig:
        for address, rank in self._ranks(abstract_flat(config)).items():
            config = config.with_format(address, LowRankSpec(rank=rank).to_json())
        return config

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        flat = tree.View(model.params)
        ranks = self._ranks(flat)
        moments, fisher = {}, {}
        if self.whitening == "activation":
            moments = context.need(self).input_moments(model, progress=context.progress)
            without = [a for a in ranks if a.removesuffix("/kernel") not in moments]
            if without:
                raise ValueError(
                    f"LowRank: no activations are recorded for {', '.join(without[:3])}; use whitening: none for it"
                )
        elif self.whitening == "fisher":
            fisher = context.need(self).fisher(model, progress=context.progress)
        changes = {}
        for address, rank in ranks.items():
            weight = np.asarray(materialize(flat[address]))
            node, spectrum = compress_matrix(
                weight, rank, moments=moments.get(address.removesuffix("/kernel")), fisher=fisher.get(address)
            )
            context.keep_spectrum(address, spectrum, rank)
            changes[address] = node
        return replace_matrices(model, changes)
