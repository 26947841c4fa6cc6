"""A step: a frozen value that maps a Model to a new Model, and the context that steps share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from flaxcompress.compress.calibrate import Calibration
from flaxcompress.config import ModelConfig, closest
from flaxcompress.config.typed import read_settings
from flaxcompress.model import Model


@dataclasses.dataclass
class Context:
    """What steps know beside the model they change.

    Attributes:
      original: the model before the first step; the teacher.
      calibration: tokens and statistics; None when no step of the recipe needs any.
      work: a folder for checkpoints of long steps, or None.
      progress: whether to show progress bars.
      mesh: devices for long steps; None: one.
      spectra: filled by steps that cut a spectrum: {address, singular_values, rank} per matrix, for the report.
      healing: filled by healing: {step, loss} entries, for the report.
      layers: the original's layer, counted from 0, whose output each of the model's layers stands for.
      choices: filled by an allocation: {address, choice, kind, bytes, loss} per matrix, for the report.
      low_memory: gather statistics one layer at a time.
      finished: {address: matrix} that an earlier run of the same step made, whole layers.
    """

    original: Model
    calibration: Calibration | None = None
    work: Path | None = None
    progress: bool = False
    mesh: Mesh | None = None
    spectra: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    healing: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    choices: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    layers: list[int] = dataclasses.field(default_factory=list)
    low_memory: bool = False
    finished: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.layers = self.layers or list(range(self.original.config.layers))

    def need(self, step: Step) -> Calibration:
        """The calibration, or ValueError when there is none."""
        if self.calibration is None:
            if self.original.config.patches is not None:
                raise ValueError(
                    f"{step.name}: these settings need text, and this is a model of images; set rounding: mse, "
                    "whitening: none, and heal by `flaxcompress train` on images"
                )
            raise ValueError(f"{step.name}: needs calibration text; pass calibration=")
        return self.calibration

    def keep_spectrum(self, address: str, spectrum: np.ndarray, rank: int) -> None:
        """Notes a cut spectrum for the report."""
        self.spectra.append({"address": address, "singular_values": np.asarray(spectrum).tolist(), "rank": int(rank)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A compression method with its settings. Calling it is pure: a new Model, nothing changed in place.

    `needs` names the statistics it reads, a subset of tokens, input_moments, gradient_moments, norms, influence.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    def name(self) -> str:
        """The step's name in recipes and reports."""
        return type(self).__name__

    def resolve(self, model: Model) -> Step:
        """This step with settings that depend on the model's assets filled in; `plan` needs no model afterwards."""
        del model
        return self

    def plan(self, config: ModelConfig) -> ModelConfig:
        """The structure after this step, without touching weights. Raises ValueError when the step does not fit."""
        raise NotImplementedError(f"{self.name}.plan")

    def bound(self, config: ModelConfig) -> int | None:
        """Bytes that the result's tensors do not exceed, where the step knows that and `plan` does not; else None."""
        del config
        return None

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        raise NotImplementedError(f"{self.name}.__call__")

    def to_json(self) -> dict[str, Any]:
        """{step name: settings that differ from the defaults}."""
        settings = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                settings[field.name] = _to_json(value)
        return {self.name: settings}


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_to_json(v) for v in value]
    return value


_STEPS: dict[str, type[Step]] = {}


_StepType = TypeVar("_StepType", bound=type[Step])


def register_step(step: _StepType) -> _StepType:
    """Class decorator: makes the step known to recipes under its class name."""
    _STEPS[step.__name__] = step
    return step


def known_steps() -> dict[str, type[Step]]:
    """All registered steps by name."""
    return dict(_STEPS)


def step_from_json(data: Mapping[str, Any], where: str = "recipe") -> Step:
    """{name: settings} -> step, with types checked. Raises ValueError naming the key and what exists."""
    if not isinstance(data, Mapping) or len(data) != 1:
        raise ValueError(f"{where}: a step is one name with its settings, e.g. 'Quantize: {{bits: 8}}'; got {data!r}")
    name, settings = next(iter(data.items()))
    if name not in _STEPS:
        raise ValueError(f"{where}: unknown step {name!r}; {closest(str(name), _STEPS)}")
    return read_settings(_STEPS[name], settings or {}, f"{where}/{name}")
