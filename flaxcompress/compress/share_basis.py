"""Low-rank kernels of several layers on one basis, with coefficients of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from flaxcompress import linalg, tree
from flaxcompress.compress.matrix_statistics import check_finite, gather
from flaxcompress.compress.metrics import INPUTS
from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.compress.uncompressed import check_uncompressed
from flaxcompress.config import ModelConfig
from flaxcompress.formats import Basis, BasisSpec, DenseSpec, LowRank, LowRankSpec, materialize, rank_for
from flaxcompress.model import Model, abstract_flat
from flaxcompress.nn.bases import BASES, is_on_basis


class Shared(NamedTuple):
    """A basis [n, R], the coefficients [R, m] of each kernel, and the spectrum that was cut."""

    basis: Float[np.ndarray, "n R"]
    coefficients: list[Float[np.ndarray, "R m"]]
    spectrum: Float[np.ndarray, " k"]


def share_basis(
    weights: Sequence[Float[np.ndarray, "n m"]],
    rank: int,
    moments: Sequence[Float[np.ndarray, "n n"]] | None = None,
    *,
    refit: bool = False,
) -> Shared:
    """The basis A and coefficients V_l of least Σ_l tr((W_l - AV_l)ᵀ C (W_l - AV_l)), with C = Σ_l C_l.

    As SVD(S[W_1 | … | W_k]) with SᵀS = C gives it (Basis Sharing, Wang et al. 2024), A = S⁻¹UΣ, here in the output-PCA
    form (see `linalg.output_pca`): the squared error is the sum of the spectrum's tail.

    Args:
      moments: C_l = E[xᵀx] of each kernel's input; None: the identity.
      refit: fit each kernel's coefficients once more, to the outputs on its own inputs C_l instead of everyone's.
    """
    found = linalg.output_pca(np.concatenate(weights, axis=1), rank, None if moments is None else np.sum(moments, 0))
    coefficients = np.split(found.right, np.cumsum([w.shape[1] for w in weights[:-1]]), axis=1)
    if refit and moments is not None:
        coefficients = [
            v + _least_squares(found.left, w - found.left @ v, c)
            for v, w, c in zip(coefficients, weights, moments, strict=True)
        ]
    return Shared(found.left, coefficients, found.spectrum)


def _least_squares(basis: np.ndarray, missing: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """The smallest X that minimises tr((M - AX)ᵀC(M - AX))."""
    metric = basis.T @ moment
    return np.linalg.lstsq(metric @ basis, metric @ missing, rcond=1e-10)[0]


class _Group(NamedTuple):
    """Kernels that get one basis, and its address."""

    basis: str
    kernels: list[str]
    rank: int


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class ShareBasis(Step):
    """Replaces the kernels of neighbouring layers by products of one basis, stored once, and coefficients of each.

    Basis Sharing (Wang et al. 2024). Every map has its own bases: queries share theirs with the queries of the next
    layers. With the same bytes the rank is higher than `LowRank` affords: of n×m kernels, k of them on a basis, R is at
    most kmn/(n + km) instead of mn/(n + m).

    Attributes:
      pattern: full-match address pattern; in each group of layers a map takes part in all of them, or in none.
      rank: R, or
      keep: the fraction of a group's parameters that basis and coefficients may hold.
      group: how many neighbouring layers share; the last ones may be fewer.
      whitening: "activation", the error of outputs on calibration text, all inputs of a group taken together; "none",
        that of weights.
      refit: with inputs of several layers, fit each layer's coefficients to its own ones afterwards.
      sentences: calibration sentences for the second moments of inputs.
      allow_larger: accept ranks at which basis and coefficients are larger than the kernels.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_moments"})

    pattern: str = dataclasses.field(kw_only=False)
    rank: int | None = None
    keep: float | None = None
    group: int = 2
    whitening: Literal["none", "activation"] = "activation"
    refit: bool = True
    sentences: int = 768
    allow_larger: bool = False

    def __post_init__(self):
        if self.group < 1:
            raise ValueError(f"ShareBasis: group must be at least 1, got {self.group}")
        if self.sentences < 1:
            raise ValueError(f"ShareBasis: sentences must be at least 1, got {self.sentences}")

    def _groups(self, config: ModelConfig, flat: Mapping[str, Any]) -> list[_Group]:
        """What gets a basis. Raises ValueError for kernels that cannot share one."""
        kernels = [a for a in flat if a.endswith("/kernel") and ((at := tree.place(a)) is None or at.part != BASES)]
        found: dict[tuple[str, str, int], dict[int, str]] = {}
        for address in tree.select(kernels, self.pattern, where="ShareBasis/pattern"):
            at = tree.place(address)
            if at is None:
                raise ValueError(f"ShareBasis: {address} stands outside of layers; leave it out of the pattern")
            if is_on_basis(flat[address]):
                raise ValueError(f"ShareBasis: {address} stands on a basis already; leave it out of the pattern")
            stack = _stack(config, at.stack)
            if (given := getattr(stack.sharing, at.part)) != tuple(range(stack.layers)):
                raise ValueError(
                    f"ShareBasis: the layers share their {at.part} already, by {list(given)}; share bases of layers "
                    "with weights of their own"
                )
            key = (at.stack, f"{at.part}/{at.path}", at.number // self.group)
            found.setdefault(key, {})[at.number] = address
        return [self._group(config, flat, *key, members) for key, members in found.items()]

    def _group(
        self, config: ModelConfig, flat: Mapping[str, Any], stack: str, path: str, number: int, members: dict[int, str]
    ) -> _Group:
        layers = range(number * self.group, min((number + 1) * self.group, _stack(config, stack).layers))
        name, first = path.removesuffix("/kernel"), next(iter(members.values()))
        if without := [layer for layer in layers if layer not in members]:
            raise ValueError(
                f"ShareBasis: layers {layers[0]} to {layers[-1]} are a group, but the pattern leaves out {name} of "
                f"layer {without[0]}; let it match all of a group or none"
            )
        for address in members.values():
            if (here := flat[address].shape) != (shape := flat[first].shape):
                raise ValueError(
                    f"ShareBasis: {first} is {shape[0]}×{shape[1]} and {address} {here[0]}×{here[1]}: kernels of "
                    "unequal shapes cannot share a basis; leave them out of the pattern"
                )
        n, m = flat[first].shape
        basis = tree.Place(stack, number, BASES, path).address
        rank = rank_for((n, m * len(members)), self.rank, self.keep, self.allow_larger, basis)
        return _Group(basis, [members[layer] for layer in layers], rank)

    def plan(self, config: ModelConfig) -> ModelConfig:
        flat = abstract_flat(config)
        groups = self._groups(config, flat)
        for group in groups:
            check_uncompressed(flat, group.kernels, self.name)
        for stack in sorted({_place(group.basis).stack for group in groups}):
            config = self._with_bases(config, stack, {_place(g.basis).number for g in groups})
        for basis, kernels, rank in groups:
            if config.format_rule(basis) is not None:  # made for other matrices
                config = config.with_format(basis, DenseSpec().to_json())
            for address in kernels:
                config = config.with_format(address, LowRankSpec(rank=rank, left=BasisSpec()).to_json())
        return config

    def _with_bases(self, config: ModelConfig, stack: str, used: set[int]) -> ModelConfig:
        """The config with a map of bases in one stack of layers."""
        old = _stack(config, stack)
        each = tuple(layer // self.group for layer in range(old.layers))
        if old.sharing.bases not in ((), each):
            raise ValueError(
                f"ShareBasis: the layers share bases already, by {list(old.sharing.bases)}; use groups like these"
            )
        if not old.sharing.bases and (without := set(each) - used):
            raise ValueError(
                f"ShareBasis: the pattern reaches no kernel of layer {min(without) * self.group}; use LowRank where "
                "only some layers are to be compressed"
            )
        new = old.replace(sharing=dataclasses.replace(old.sharing, bases=each))
        return config.replace(decoder=new) if stack else new

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        config, flat = self.plan(model.config), tree.View(model.params)
        groups = self._groups(model.config, flat)
        weights = {a: np.asarray(materialize(flat[a]), np.float64) for group in groups for a in group.kernels}
        for address, weight in weights.items():
            check_finite(weight, f"ShareBasis: {address}")
        needs = {INPUTS} if self.whitening == "activation" else set()
        statistics = gather(
            model,
            context.need(self) if needs else None,
            {a: w.shape for a, w in weights.items()},
            needs,
            sentences=self.sentences,
            where=self.name,
            progress=context.progress,
        )
        changes: dict[str, Any] = {}
        for basis, kernels, rank in groups:
            moments = [np.asarray(statistics[a].input_moments, np.float64) for a in kernels] if needs else None
            shared = share_basis([weights[a] for a in kernels], rank, moments, refit=self.refit)
            changes[basis] = jnp.asarray(shared.basis, jnp.float32)
            for address, right in zip(kernels, shared.coefficients, strict=True):
                changes[address] = LowRank(left=Basis(*shared.basis.shape), right=jnp.asarray(right, jnp.float32))
            context.keep_spectrum(basis, shared.spectrum, rank)
        return model.replace(params=tree.replace(model.params, changes), config=config)  # pyright: ignore[reportAttributeAccessIssue]


def _stack(config: ModelConfig, name: str) -> ModelConfig:
    """The structure of a stack of layers."""
    return config.decoder if name and config.decoder is not None else config


def _place(address: str) -> tree.Place:
    found = tree.place(address)
    assert found is not None
    return found
