"""The structure of a model: what the network computes, apart from its weights."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from flax.core import FrozenDict

PARTS = ("attention", "feed_forward", "norms")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
HEADS = ("none", "masked_lm")


def closest(name: str, known: Iterable[str]) -> str:
    """A sentence that lists what exists and the closest name to `name`."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"known: {', '.join(known) or 'nothing'}{hint}"


def reject_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError naming the first key of `given` that is not in `known`."""
    known = set(known)
    for key in given:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; {closest(str(key), known)}")


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return FrozenDict({k: _freeze(v) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(v) for v in value)
    return value


def _thaw(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _thaw(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [_thaw(v) for v in value]
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormatRule:
    """`spec` (a JSON object with a "kind") for every matrix whose address fully matches `pattern`."""

    pattern: str
    spec: Mapping[str, Any]

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"formats: {self.pattern!r} is not a regular expression: {error}") from None
        if not isinstance(self.spec, Mapping) or "kind" not in self.spec:
            raise ValueError(f"formats: the rule for {self.pattern!r} needs an object with a 'kind', got {self.spec!r}")
        object.__setattr__(self, "spec", _freeze(self.spec))

    def __hash__(self):
        return hash((self.pattern, self.spec))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharing:
    """Which weight set each of the L layers uses, part by part.

    A map such as (0, 1, 0, 1) stores two sets and uses each twice. Sets are numbered in order of
    first use, so a map of distinct numbers means that every layer owns its part.
    """

    attention: tuple[int, ...]
    feed_forward: tuple[int, ...]
    norms: tuple[int, ...]

    @classmethod
    def own(cls, layers: int) -> Sharing:
        """Every layer has weights of its own."""
        each = tuple(range(layers))
        return cls(attention=each, feed_forward=each, norms=each)

    def __post_init__(self):
        lengths = {part: len(getattr(self, part)) for part in PARTS}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"sharing: every map needs one entry per layer, got lengths {lengths}")
        for part in PARTS:
            sets = tuple(int(s) for s in getattr(self, part))
            object.__setattr__(self, part, sets)
            first_uses = list(dict.fromkeys(sets))
            if first_uses != list(range(len(first_uses))):
                raise ValueError(
                    f"sharing/{part}: {list(sets)} must number its weight sets 0, 1, 2, … in order of first use"
                )

    def sets(self, part: str) -> int:
        """The number of stored weight sets of `part`."""
        return max(getattr(self, part)) + 1


_SIMPLE: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "bool": bool}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A transformer encoder's structure; family-neutral names, dimension letters beside them.

    Raises ValueError on construction when fields contradict each other.
    """

    family: str = "bert"
    vocabulary: int  # V
    width: int  # D
    layers: int  # L
    heads: int  # H
    feed_forward_width: int  # F
    positions: int = 512
    segments: int = 2
    activation: str = "gelu"
    norm_epsilon: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02
    pad_token: int = 0
    pooler: bool = True
    head: str = "none"
    sharing: Sharing = None  # pyright: ignore[reportAssignmentType]  (None: every layer owns its weights)
    formats: tuple[FormatRule, ...] = ()

    def __post_init__(self):
        for name in ("vocabulary", "width", "layers", "heads", "feed_forward_width", "positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"config: {name} must be a positive integer, got {value!r}")
        for field in dataclasses.fields(self):
            kind, value = _SIMPLE.get(str(field.type)), getattr(self, field.name)
            if kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
                raise ValueError(f"config: {field.name} must be of type {field.type}, got {value!r}")
        if self.segments < 0:
            raise ValueError(f"config: segments must be 0 or more, got {self.segments}")
        if self.width % self.heads:
            raise ValueError(f"config: width {self.width} is not divisible by heads {self.heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"config: unknown activation {self.activation!r}; {closest(self.activation, ACTIVATIONS)}")
        if self.head not in HEADS:
            raise ValueError(f"config: unknown head {self.head!r}; {closest(self.head, HEADS)}")
        if not self.norm_epsilon > 0:
            raise ValueError(f"config: norm_epsilon must be positive, got {self.norm_epsilon}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"config: {name} must lie in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.pad_token < self.vocabulary:
            raise ValueError(f"config: pad_token {self.pad_token} lies outside the vocabulary of {self.vocabulary}")
        if self.sharing is None:
            object.__setattr__(self, "sharing", Sharing.own(self.layers))
        if len(self.sharing.attention) != self.layers:
            raise ValueError(f"sharing: the maps have {len(self.sharing.attention)} entries for {self.layers} layers")
        object.__setattr__(self, "formats", tuple(self.formats))

    @property
    def head_width(self) -> int:
        """d, the width of one attention head."""
        return self.width // self.heads

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def with_format(self, address: str, spec: Mapping[str, Any]) -> ModelConfig:
        """Puts a rule for exactly `address` first, in place of an earlier exact one."""
        return self.with_rule(re.escape(address).replace(r"\-", "-"), spec)

    def with_rule(self, pattern: str, spec: Mapping[str, Any]) -> ModelConfig:
        """Puts a format rule first, in place of an earlier one of the same pattern."""
        rule = FormatRule(pattern=pattern, spec=spec)
        rest = tuple(r for r in self.formats if r.pattern != rule.pattern)
        return self.replace(formats=(rule, *rest))

    def format_rule(self, address: str) -> Mapping[str, Any] | None:
        """The spec of the first rule that fully matches `address`, or None for a dense float32 matrix."""
        for rule in self.formats:
            if re.fullmatch(rule.pattern, address):
                return rule.spec
        return None

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` is its inverse."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["sharing"] = {part: list(getattr(self.sharing, part)) for part in PARTS}
        out["formats"] = [[rule.pattern, _thaw(rule.spec)] for rule in self.formats]
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Reads `to_json`'s object; unknown or missing keys raise ValueError."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        reject_unknown("config", data, fields)
        missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in data]
        if missing:
            raise ValueError(f"config: missing {', '.join(missing)}")
        values = dict(data)
        if values.get("sharing") is not None:
            reject_unknown("config/sharing", values["sharing"], PARTS)
            if without := [p for p in PARTS if p not in values["sharing"]]:
                raise ValueError(f"config/sharing: missing {', '.join(without)}")
            values["sharing"] = Sharing(**{p: tuple(values["sharing"][p]) for p in PARTS})
        rules = values.get("formats", ())
        if not isinstance(rules, (list, tuple)):
            raise ValueError(f"config/formats: expected a list of [pattern, format], got {rules!r}")
        for rule in rules:
            if not isinstance(rule, (list, tuple)) or len(rule) != 2:
                raise ValueError(f"config/formats: a rule is [pattern, format], got {rule!r}")
        values["formats"] = tuple(FormatRule(pattern=p, spec=s) for p, s in rules)
        return cls(**values)
