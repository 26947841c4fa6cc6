"""Sharing weights between layers that were trained with their own, and what each layer adds to them again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from flaxcompress import linalg, tree
from flaxcompress.compress.renumber import rules_follow
from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.config import Deltas, ModelConfig, Sharing
from flaxcompress.formats import DenseSpec, Format, materialize, nbytes, spec_for
from flaxcompress.model import Model, abstract_flat, init_params

Initializer = Literal["stepwise", "mean", "weighted", "random"]
MapName = Literal["sequence", "cycle", "cycle_rev", "all", "pairs"]
_RIDGE = 1e-2  # of the mean diagonal of ΣC_l: inputs that calibration hardly met decide as little as in a mean


def tied_matrix(
    weights: Sequence[Float[np.ndarray, "n m"]],
    moments: Sequence[Float[np.ndarray, "n n"]] | None = None,
    *,
    ridge: float = _RIDGE,
) -> Float[np.ndarray, "n m"]:
    """The one matrix W' that stands for several W_l, float64: their mean, or the one closest in what they put out.

    With C_l = E[x_lᵀx_l] it minimises Σ_l E‖x_l(W_l - W')‖² + λΣ_l‖W_l - W'‖², so that
    W' = (Σ(C_l + λI))⁻¹ Σ(C_l + λI)W_l: a mean weighted by the inputs that each layer sees.

    Args:
      ridge: λ relative to the mean of the diagonals of C_l; the larger, the closer to the mean.
    """
    own = [np.asarray(weight, np.float64) for weight in weights]
    if moments is None:
        return np.mean(own, 0)
    metrics = [np.asarray(moment, np.float64) for moment in moments]
    damping = ridge * float(np.mean([np.trace(c) / len(c) for c in metrics]))
    metrics = [c + damping * np.eye(len(c)) for c in metrics]
    return np.linalg.solve(np.sum(metrics, 0), np.sum([c @ w for c, w in zip(metrics, own, strict=True)], 0))


def residual_factors(
    residual: Float[np.ndarray, "n m"], rank: int, moments: Float[np.ndarray, "n n"] | None = None
) -> linalg.Factors:
    """Factors [n, R] and [R, m] of what a layer misses: those closest in output (see `linalg.output_pca`).

    A rank over min(n, m) is filled up with zeros; at min(n, m) nothing is cut, whatever the metric.
    """
    full = min(residual.shape)
    found = linalg.output_pca(residual, min(rank, full), None if rank >= full else moments)
    more = max(0, rank - full)
    return found._replace(left=np.pad(found.left, ((0, 0), (0, more))), right=np.pad(found.right, ((0, more), (0, 0))))


def stepwise_layer(number: int, sets: int, layers: int) -> int:
    """The layer whose weights set `number` takes: evenly spaced, the first and the last among them."""
    return number * (layers - 1) // (sets - 1) if sets > 1 else 0


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class Share(Step):
    """Ties the layers of a model by a map: each weight set is stored once; every layer keeps its norms.

    Relaxed Recursive Transformers (Bae et al. 2024), and "weighted" beside them. With `residual_rank` each layer adds
    low-rank deltas, and its own biases, to the linear maps that it shares; at full rank the model computes what it did.
    What parts hold beside linear maps (convolutions, norms of queries) is shared without a delta.

    Attributes:
      map: "sequence", "cycle" or "cycle_rev" with `sets`, "pairs", "all" (see `Sharing.named`); or each layer's set.
      sets: M, the number of stored sets.
      parts: which parts of a layer are shared.
      initializer: a set is the weights of one layer ("stepwise": layers at equal steps, the first and the last among
        them), the "mean" of those that use it, the mean "weighted" by their inputs on calibration text (see
        `tied_matrix`), or "random". Vectors are plain means where matrices are weighted.
      residual_rank: R of the deltas; 0 for none.
      residual_whitening: the deltas minimise the error of outputs on calibration text; otherwise that of weights.
      allow_larger: accept deltas with which the model is not smaller.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_moments"})

    map: MapName | tuple[int, ...] = "sequence"
    sets: int | None = None
    parts: tuple[Literal["attention", "feed_forward"], ...] = ("attention", "feed_forward")
    initializer: Initializer = "stepwise"
    residual_rank: int = 0
    residual_whitening: bool = True
    allow_larger: bool = False

    def __post_init__(self):
        for name in ("map", "parts"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        if not self.parts or len(set(self.parts)) != len(self.parts):
            raise ValueError(f"Share: parts must name attention, feed_forward or both, got {list(self.parts)}")
        if self.residual_rank < 0:
            raise ValueError(f"Share: residual_rank must not be negative, got {self.residual_rank}")

    def _map(self, layers: int) -> tuple[int, ...]:
        """Each layer's weight set."""
        if isinstance(self.map, str):
            return Sharing.named(self.map, layers=layers, sets=self.sets).attention
        if len(self.map) != layers:
            raise ValueError(f"Share: map has {len(self.map)} entries for {layers} layers")
        stored = len(set(self.map))
        if self.sets not in (None, stored):
            raise ValueError(f"Share: map stores {stored} sets, but sets is {self.sets}; leave it out")
        return self.map

    def _check(self, config: ModelConfig, flat: Mapping[str, Any], users: Sequence[Sequence[int]]) -> None:
        """Raises ValueError unless the layers of every set have the same weights, of kinds that can be averaged."""
        if config.decoder is not None:
            raise ValueError("Share: a model with a decoder has two stacks of layers; it cannot be shared by one map")
        if config.deltas is not None:
            raise ValueError("Share: the model has deltas, which were made for other weights; merge them first")
        for part in self.parts:
            if (given := getattr(config.sharing, part)) != tuple(range(config.layers)):
                raise ValueError(f"Share: the layers share their {part} already, by {list(given)}")
        averaged = self.residual_rank or self.initializer in ("mean", "weighted")
        for number, (first, *others) in enumerate(users):
            if self.initializer == "stepwise":
                others.append(stepwise_layer(number, len(users), config.layers))
            for address in _within(flat, first, self.parts):
                for layer in (first, *others):
                    there = _at(address, layer)
                    if averaged and not isinstance(spec_for(config, there), DenseSpec):
                        raise ValueError(
                            f"Share: {there} is stored as {config.format_rule(there)['kind']}; share before other "  # pyright: ignore[reportOptionalSubscript]
                            "formats, or use initializer: stepwise without a residual"
                        )
                    if tree.signature(flat.get(there)) != tree.signature(flat[address]):
                        raise ValueError(
                            f"Share: layers {first} and {layer} cannot share {address.split('/', 2)[2]}: their shapes "
                            "or formats differ"
                        )

    def plan(self, config: ModelConfig) -> ModelConfig:
        each, flat = self._map(config.layers), abstract_flat(config)
        sharing = dataclasses.replace(config.sharing, **dict.fromkeys(self.parts, each))
        users = _users(each)
        self._check(config, flat, users)
        new = {"sharing": sharing}
        if "feed_forward" in self.parts:
            new["feed_forward_width"] = tuple(config.feed_forward_width_of(first) for first, *_ in users)
        if self.residual_rank:
            new["deltas"] = self._deltas(flat)
        shared = config.replace(**new)
        moved: dict[str, str | None] = {}
        for number, (first, *_) in enumerate(users):
            moved |= {_at(address, number): address for address in _within(flat, first, self.parts)}
        moved |= {address: None for address in abstract_flat(shared) if "/deltas/" in address}
        shared = rules_follow(shared, config, moved)
        before, after = (sum(map(nbytes, nodes.values())) for nodes in (flat, abstract_flat(shared)))
        if after >= before and not self.allow_larger:
            raise ValueError(
                f"Share: {before / 1e6:.2f} MB would become {after / 1e6:.2f} MB; use fewer sets or a smaller "
                "residual_rank, or set allow_larger: true"
            )
        return shared

    def _deltas(self, flat: Mapping[str, Any]) -> Deltas:
        kernels = {a: flat[a].shape for a in _within(flat, 0, self.parts) if a.endswith("/kernel")}
        largest = max(min(shape) for shape in kernels.values())
        if self.residual_rank > largest:
            raise ValueError(f"Share: residual_rank {self.residual_rank} is over {largest}, the full rank of kernels")
        biased = any(f"{address.removesuffix('/kernel')}/bias" in flat for address in kernels)
        targets = tuple(f"{part}/.*" for part in self.parts)
        return Deltas(rank=self.residual_rank, targets=targets, bias=biased)

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        config, flat = self.plan(model.config), tree.View(model.params)
        moments: Mapping[str, Any] = {}
        if self.initializer == "weighted" or (self.residual_rank and self.residual_whitening):
            moments = context.need(self).input_moments(model, progress=context.progress)
        old = [a for layer in range(config.layers) for a in _within(flat, layer, self.parts)]
        without = [a for a in old if moments and a.endswith("/kernel") and a.removesuffix("/kernel") not in moments]
        if without:
            raise ValueError(
                f"Share: no activations are recorded for {', '.join(without[:3])}; use another initializer and "
                "residual_whitening: false"
            )
        drawn = tree.View(init_params(config, key)) if self.initializer == "random" else {}
        shapes, users = abstract_flat(config), _users(self._map(config.layers))
        changes: dict[str, Any] = {}
        for number, layers in enumerate(users):
            for address in _within(flat, layers[0], self.parts):
                to = _at(address, number)
                if self.initializer == "random":
                    changes[to] = drawn[to]
                elif self.initializer == "stepwise":
                    changes[to] = flat[_at(address, stepwise_layer(number, len(users), config.layers))]
                else:
                    changes[to] = jnp.asarray(self._tied(address, layers, flat, moments), shapes[to].dtype)
        if self.residual_rank:
            for number, layers in enumerate(users):
                for layer in layers:
                    changes |= self._residual(layer, number, flat, changes, moments, context)
        params = tree.replace(model.params, changes, drop=set(old) - set(changes))
        return model.replace(params=params, config=config)  # pyright: ignore[reportAttributeAccessIssue]

    def _tied(self, address: str, layers: Sequence[int], flat: Mapping[str, Any], moments: Mapping[str, Any]) -> Any:
        """What stands for an address of several layers."""
        there = [_at(address, layer) for layer in layers]
        weighted = self.initializer == "weighted" and address.endswith("/kernel")
        metrics = [moments[a.removesuffix("/kernel")] for a in there] if weighted else None
        return tied_matrix([_values(flat[a]) for a in there], metrics)

    def _residual(
        self,
        layer: int,
        number: int,
        flat: Mapping[str, Any],
        shared: Mapping[str, Any],
        moments: Mapping[str, Any],
        context: Context,
    ) -> dict[str, jax.Array]:
        """The deltas of a layer that uses set `number`."""
        found: dict[str, jax.Array] = {}
        for address in _within(flat, layer, self.parts):
            linear, _, last = address.rpartition("/")
            to = linear.replace(f"layers/{layer}/", f"layers/{layer}/deltas/", 1)
            if last == "kernel":
                missing = _values(flat[address]) - _values(shared[_at(address, number)])
                metric = moments[linear] if self.residual_whitening else None
                factors = residual_factors(missing, self.residual_rank, metric)
                found[f"{to}/down"] = jnp.asarray(factors.left, jnp.float32)
                found[f"{to}/up"] = jnp.asarray(factors.right, jnp.float32)
                context.keep_spectrum(to, factors.spectrum, min(self.residual_rank, *missing.shape))
            elif last == "bias" and f"{linear}/kernel" in flat:
                missing = _values(flat[address]) - _values(shared[_at(address, number)])
                found[f"{to}/bias"] = jnp.asarray(missing, jnp.float32)
        return found


def _users(each: Sequence[int]) -> list[list[int]]:
    """The layers that use each weight set."""
    return [[layer for layer, number in enumerate(each) if number == n] for n in range(max(each) + 1)]


def _within(flat: Mapping[str, Any], layer: int, parts: Sequence[str]) -> list[str]:
    """The addresses of some parts of a layer."""
    return [a for a in flat if (at := tree.place(a)) and at.number == layer and at.part in parts]


def _at(address: str, number: int) -> str:
    """The same address in another weight set."""
    found = tree.place(address)
    assert found is not None
    return found._replace(number=number).address


def _values(node: Any) -> np.ndarray:
    return np.asarray(materialize(node) if isinstance(node, Format) else node, np.float64)
