"""Recipes: lists of steps, from Python or YAML, and what they would do to a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from flaxcompress.compress.allocate import Allocate
from flaxcompress.compress.heal import Heal
from flaxcompress.compress.step import Step, step_from_json
from flaxcompress.compress.target import parse_target
from flaxcompress.compress.trim import Trim
from flaxcompress.config import closest, reject_unknown
from flaxcompress.formats import nbytes
from flaxcompress.model import Model, abstract_flat

_SIZED = (
    "Trim",
    "FactorizeEmbedding",
    "LowRank",
    "Quantize",
    "Allocate",
    "Heal",
)  # steps that a target may replace, and healing
_LONG = 1000  # steps of healing


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a recipe would store, step by step, computed without touching a weight.

    Attributes:
      before: bytes of the model's tensors now.
      steps: (name, bytes of the tensors afterwards); upper bounds where a size depends on the data.
    """

    before: int
    steps: tuple[tuple[str, int], ...]

    @property
    def after(self) -> int:
        """Bytes after the last step."""
        return self.steps[-1][1] if self.steps else self.before

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        steps = [{"name": name, "bytes": size} for name, size in self.steps]
        return {"before": self.before, "after": self.after, "steps": steps}

    def table(self) -> Any:
        """A rich table."""
        from rich.table import Table

        table = Table("step", "MB", "of the original", title="plan")
        table.add_row("original", f"{self.before / 1e6:.2f}", "1×")
        for name, size in self.steps:
            table.add_row(name, f"≤ {size / 1e6:.2f}", f"{self.before / size:.1f}× smaller")
        return table

    def __str__(self) -> str:
        lines = [f"original: {self.before / 1e6:.2f} MB"]
        lines += [f"{name}: ≤ {size / 1e6:.2f} MB" for name, size in self.steps]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Steps in order, a line that says what they are for, and how calibration text is prepared for all of them.

    Attributes:
      scrambled: the share of calibration sentences whose words are exchanged for random ones (see `Calibration`).
    """

    steps: tuple[Step, ...]
    description: str = ""
    scrambled: float = 0.5

    def __init__(self, steps: Sequence[Step], description: str = "", scrambled: float = 0.5):
        for step in steps:
            if not isinstance(step, Step):
                raise TypeError(f"Recipe: {step!r} is not a step")
        if isinstance(scrambled, bool) or not isinstance(scrambled, (int, float)) or not 0 <= scrambled <= 1:
            raise ValueError(f"recipe: scrambled must be a number from 0 to 1, got {scrambled!r}")
        object.__setattr__(self, "steps", tuple(steps))
        object.__setattr__(self, "description", description)
        object.__setattr__(self, "scrambled", float(scrambled))

    @classmethod
    def load(cls, name: str | Path) -> Recipe:
        """A recipe that ships (see `recipe_names`) or a YAML file.

        Raises ValueError for unknown names, steps, keys and values, FileNotFoundError for a missing file.
        """
        text = str(name)
        if text in recipe_names():
            content = resources.files("flaxcompress.compress.recipes").joinpath(f"{text}.yaml").read_text("utf-8")
            return cls.from_yaml(content, where=text)
        path = Path(text)
        if path.suffix not in (".yaml", ".yml"):
            raise ValueError(f"recipe: no recipe {text!r} and not a .yaml file; {closest(text, recipe_names())}")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such recipe file")
        try:
            content = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
        return cls.from_yaml(content, where=str(path))

    @classmethod
    def from_yaml(cls, text: str, *, where: str = "recipe") -> Recipe:
        """Reads `{description: …, scrambled: 0.5, steps: [{Quantize: {bits: 8}}, …]}`."""
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None
        return cls.from_json(data, where=where)

    @classmethod
    def from_json(cls, data: Any, *, where: str = "recipe") -> Recipe:
        """The inverse of `to_json`."""
        if not isinstance(data, dict) or not isinstance(data.get("steps"), list):
            raise ValueError(f"{where}: expected an object with a list of 'steps'")
        reject_unknown(where, data, ("description", "scrambled", "steps"))
        if not data["steps"]:
            raise ValueError(f"{where}: has no steps")
        steps = [step_from_json(s, f"{where}/steps/{i}") for i, s in enumerate(data["steps"])]
        return cls(steps, str(data.get("description", "")), data.get("scrambled", cls.scrambled))

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        steps = [s.to_json() for s in self.steps]
        return {"description": self.description, "scrambled": self.scrambled, "steps": steps}

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that any of the steps reads."""
        return frozenset().union(*(s.needs for s in self.steps))

    def plan(self, model: Model) -> Plan:
        """Sizes after every step, without computing anything. Raises ValueError when a step does not fit the model."""
        config = model.config
        done = []
        for step in self.steps:
            step = step.resolve(model)
            bound = step.bound(config)
            config = step.plan(config)
            size = sum(nbytes(node) for node in abstract_flat(config).values())
            done.append((step.name, size if bound is None else min(bound, model.nbytes)))
        return Plan(model.nbytes, tuple(done))

    def with_target(self, target: str, model: Model) -> Recipe:
        """A recipe whose choices fit `target` (see `Allocate`); healing and calibration settings are kept.

        Raises ValueError for a recipe with a step that an allocation cannot replace, and for a target out of reach.
        """
        parse_target(target, model.nbytes)
        other = [s.name for s in self.steps if s.name not in _SIZED]
        if other:
            raise ValueError(
                f"target {target!r}: chooses how kernels and table are stored, and cannot fit a recipe with "
                f"{other[0]}; leave the target or the step out, or put Allocate into the recipe yourself"
            )
        heal = [s for s in self.steps if isinstance(s, Heal)]
        trim = Trim(positions="limit", pooler="unused", dtype="float16")
        weights = _weights(sum(step.steps for step in heal))
        choice = Allocate(target=target, weights=weights)
        recipe = Recipe([trim, choice, *heal], f"{target}, chosen by predicted loss", self.scrambled)
        recipe.plan(model)
        return recipe

    def with_heal_steps(self, count: int) -> Recipe:
        """The recipe with `count` healing steps; 0 leaves healing out. Adds healing at the end when there is none."""
        if count < 0:
            raise ValueError(f"heal-steps must not be negative, got {count}")
        if count == 0:
            return self._with([s for s in self.steps if not isinstance(s, Heal)])
        if not any(isinstance(s, Heal) for s in self.steps):
            return self._with([*self.steps, Heal(steps=count)])
        changed = [dataclasses.replace(s, steps=count) if isinstance(s, Heal) else s for s in self.steps]
        return self._with(changed)

    def _with(self, steps: Sequence[Step]) -> Recipe:
        return Recipe(steps, self.description, self.scrambled)


def _weights(steps: int) -> dict[str, float]:
    """What losses count in a choice that is healed for so many steps, as experiments/one_budget.py found.

    A short healing brings hardly anything back that a low rank lost, and much of what rounding did; a long one brings
    kernels back, and less of the token table.
    """
    if not steps:
        return {}
    return {"rank": 10.0} if steps < _LONG else {"table": 2.5}


def recipe_names() -> list[str]:
    """The recipes that ship."""
    folder = resources.files("flaxcompress.compress.recipes")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))
