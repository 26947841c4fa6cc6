"""The optimizer of a training run, from a few settings: optax's, made to see the matrices in a stack of layers."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from flaxcompress.config import closest
from flaxcompress.train.depth import scale_by_depth, unfreeze_by_depth
from flaxcompress.train.leaves import describe, each_set, matrices
from flaxcompress.train.pruning import GradualPruning, prune_gradually
from flaxcompress.train.schedule import ENDING, SCHEDULES, make_schedule

_LONGEST_WARMUP = 1000


class _Defaults(NamedTuple):
    """What b1, b2 and eps are where they are not given; None for what an optimizer does without."""

    b1: float | None
    b2: float | None
    eps: float | None


OPTIMIZERS = {
    "adamw": _Defaults(0.9, 0.999, 1e-8),
    "lion": _Defaults(0.9, 0.99, None),
    "adafactor": _Defaults(None, None, 1e-30),
    "lamb": _Defaults(0.9, 0.999, 1e-6),
    "muon": _Defaults(0.95, 0.999, 1e-8),
}
_ADAM_B1 = 0.9  # of the AdamW beside Muon
_MUON_SIZE = 0.2  # the root mean square of Adam's updates, see Liu et al. 2025, "Muon is scalable", eq. 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """How weights are moved.

    Attributes:
      name: "adamw"; "lion" (Chen et al. 2023; rates a tenth of Adam's); "adafactor" (Shazeer & Stern 2018; relative to
        each matrix's size, so that 1e-2 suits most); "lamb" (You et al. 2020: Adam's step, scaled matrix by matrix to
        the matrix's norm; biases and norms take it as it is); "muon" (Jordan 2024: the orthogonalized momentum of the
        maps inside layers, scaled to Adam's size as Liu et al. 2025 do; AdamW for all else).
      learning_rate: at the peak of the schedule.
      schedule: "cosine", "linear", "constant", "rsqrt" or "wsd", see `make_schedule`.
      warmup: steps of linear warm-up; None: a tenth of the run, 1,000 at most.
      end: what is left of the learning rate at the end of the run, as a share of its peak.
      cooldown: the share of the run in which "wsd" falls.
      weight_decay: what matrices lose per step, times the learning rate (decoupled, Loshchilov & Hutter 2019); biases,
        norms and scales lose nothing.
      b1: how slowly momentum decays; None: 0.9, Muon's 0.95, none for adafactor.
      b2: how slowly second moments decay (lion: the momentum itself); None: 0.999, lion's 0.99.
      eps: beside the root of second moments; None: 1e-8, LAMB's 1e-6, and 1e-30 in Adafactor's squares.
      clip: the largest global norm of the gradient; None: any.
      layer_decay: the learning rate of each layer as a share of that of the layer above; None: all have the same.
      unfreeze_every: so many steps after the head the topmost layer begins to move, after as many the next, the
        embedding last; 0: all move from the start.
      prune: makes ever more of the maps' weights zero while they train; None: none.

    Raises ValueError for unknown names, numbers out of range, and settings that the optimizer or schedule lacks.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup: int | None = None
    end: float = 0.0
    cooldown: float = 0.1
    weight_decay: float = 0.01
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    clip: float | None = 1.0
    layer_decay: float | None = None
    unfreeze_every: int = 0
    prune: GradualPruning | None = None

    def __post_init__(self):
        for kind, given, known in (("name", self.name, OPTIMIZERS), ("schedule", self.schedule, SCHEDULES)):
            if given not in known:
                raise ValueError(f"optimizer: unknown {kind} {given!r}; {closest(str(given), known)}")
        for name in ("learning_rate", "eps", "clip"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"optimizer: {name} must be positive, got {value}")
        for name in ("b1", "b2"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 1:
                raise ValueError(f"optimizer: {name} must lie in [0, 1), got {value}")
        for name, low, high in (("end", 0.0, 1.0), ("weight_decay", 0.0, float("inf"))):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"optimizer: {name} must lie in {low:g} … {high:g}, got {getattr(self, name)}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"optimizer: layer_decay must lie in (0, 1], got {self.layer_decay}")
        if self.unfreeze_every < 0:
            raise ValueError(f"optimizer: unfreeze_every must not be negative, got {self.unfreeze_every}")
        if not 0 < self.cooldown <= 1:
            raise ValueError(f"optimizer: cooldown must lie in (0, 1], got {self.cooldown}")
        if self.warmup is not None and self.warmup < 0:
            raise ValueError(f"optimizer: warmup must not be negative, got {self.warmup}")
        for name, missing in (("b2", self.name == "adafactor"), ("eps", self.name == "lion")):
            if missing and getattr(self, name) is not None:
                raise ValueError(f"optimizer: {self.name} has no {name}; leave it out")
        if self.end and self.schedule not in ENDING:
            raise ValueError(f"optimizer: the schedule {self.schedule!r} has no end; leave end out")
        if self.schedule == "rsqrt" and self.warmup == 0:
            raise ValueError("optimizer: the schedule 'rsqrt' is measured in steps of warmup; it needs at least 1")

    def learning_rates(self, steps: int) -> optax.Schedule:
        """The learning rate by step, of a run of `steps` steps.

        Raises ValueError when the run ends before its warm-up does.
        """
        warmup = min(_LONGEST_WARMUP, -(-steps // 10)) if self.warmup is None else self.warmup
        if self.warmup is not None and warmup >= steps:
            raise ValueError(f"optimizer: a warmup of {warmup} steps is as long as the run of {steps}; shorten it")
        return make_schedule(
            self.schedule,
            peak=self.learning_rate,
            steps=steps,
            warmup=warmup,
            end=self.end,
            cooldown=self.cooldown,
        )

    def build(self, steps: int) -> optax.GradientTransformation:
        """The transformation of gradients into updates, for trees of parameters as models have them."""
        known = OPTIMIZERS[self.name]
        b1, b2, eps = (
            default if given is None else given
            for given, default in zip((self.b1, self.b2, self.eps), known, strict=True)
        )
        parts = [] if self.clip is None else [optax.clip_by_global_norm(self.clip)]
        parts += _STEPS[self.name](b1, b2, eps)
        if self.weight_decay:
            parts.append(optax.add_decayed_weights(self.weight_decay, mask=matrices))
        if self.name == "lamb":
            parts.append(optax.masked(each_set(optax.scale_by_trust_ratio()), matrices))
        if self.layer_decay is not None:
            parts.append(scale_by_depth(self.layer_decay))
        if self.unfreeze_every:
            parts.append(unfreeze_by_depth(self.unfreeze_every))
        parts.append(optax.scale_by_learning_rate(self.learning_rates(steps)))
        if self.prune is not None:
            parts.append(prune_gradually(self.prune, steps))
        return optax.chain(*parts)


def _adam(b1: float, b2: float, eps: float) -> list[optax.GradientTransformation]:
    return [optax.scale_by_adam(b1=b1, b2=b2, eps=eps)]


def _lion(b1: float, b2: float, eps: None) -> list[optax.GradientTransformation]:
    del eps
    return [optax.scale_by_lion(b1=b1, b2=b2)]


def _adafactor(b1: float | None, b2: None, eps: float) -> list[optax.GradientTransformation]:
    del b2  # its second moments decay as 1 - step^-0.8
    factored, clipped = optax.scale_by_factored_rms(epsilon=eps), optax.clip_by_block_rms(1.0)
    parts = [each_set(optax.chain(factored, clipped, optax.scale_by_param_block_rms()))]
    return parts if b1 is None else [*parts, optax.ema(b1, debias=False)]


def _muon(b1: float, b2: float, eps: float) -> list[optax.GradientTransformation]:
    maps = optax.chain(
        scale_by_muon(beta=b1, eps=eps, weight_dimension_numbers=_last_two_axes),
        optax.stateless(lambda updates, _: jax.tree.map(_sized, updates)),
    )
    rest = optax.scale_by_adam(b1=_ADAM_B1, b2=b2, eps=eps)
    label = lambda path, leaf: "maps" if describe(path, leaf).dense_map else "rest"  # noqa: E731
    labels = lambda params: jax.tree_util.tree_map_with_path(label, params)  # noqa: E731
    return [optax.partition({"maps": maps, "rest": rest}, labels)]


def _sized(update: jax.Array) -> jax.Array:
    """An orthogonal n×m matrix, whose root mean square is max(n, m)^-½, brought to that of Adam's updates."""
    return _MUON_SIZE * max(update.shape[-2:]) ** 0.5 * update


def _last_two_axes(updates: Any) -> Any:
    """Matrices are the last two axes; the axis of stacked layers before them is a batch."""
    return jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), updates)


_STEPS: dict[str, Any] = {"adamw": _adam, "lion": _lion, "adafactor": _adafactor, "lamb": _adam, "muon": _muon}
