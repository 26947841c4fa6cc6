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
NORMS = ("layer", "rms")
NORM_PLACES = ("post", "pre")
CLASSIFIERS = ("sequence_classification", "token_classification", "span")
HEADS = ("none", "masked_lm", "replaced_token", "causal_lm", *CLASSIFIERS)
ROTARY_SCALINGS = ("none", "linear", "llama3")


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
class Rotary:
    """Rotary positions (Su et al. 2021): the base θ of the frequencies, and how they are stretched for longer text.

    Attributes:
      theta: θ.
      local_theta: of layers with a window; None for `theta`.
      scaling: "none", "linear" (all frequencies divided by `factor`) or "llama3" (only the low ones, with a smooth
        change between).
      factor, low_frequency_factor, high_frequency_factor, original_positions: of the scaling.
    """

    theta: float = 10_000.0
    local_theta: float | None = None
    scaling: str = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192

    def __post_init__(self):
        if self.scaling not in ROTARY_SCALINGS:
            raise ValueError(f"rotary: unknown scaling {self.scaling!r}; {closest(self.scaling, ROTARY_SCALINGS)}")
        for name in ("theta", "factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"rotary: {name} must be positive, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patches:
    """An image's patches as tokens: `size`×`size` pixels each of an image [channels, height, width]."""

    height: int
    width: int
    size: int
    channels: int = 3

    def __post_init__(self):
        for name in ("height", "width", "size", "channels"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"patches: {name} must be a positive integer, got {getattr(self, name)!r}")
        if min(self.grid) < 1:
            raise ValueError(f"patches: an image of {self.height}×{self.width} has no patch of {self.size}×{self.size}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.height // self.size, self.width // self.size

    @property
    def count(self) -> int:
        """Patches in all."""
        return self.grid[0] * self.grid[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A transformer's structure; family-neutral names, dimension letters beside them.

    Attributes:
      embedding_width: E, when the embeddings are narrower (or wider) than the layers: they are normalised in E and then
        mapped to D (ALBERT, Lan et al. 2020). None: D, without a map.
      positions: the longest sequence.
      position_offset: the row of the first position in the position table. Above 0, positions count tokens other than
        `pad_token`, and padding reads the row before (RoBERTa).
      segments: rows of the segment table; 0 for none.
      relative_buckets: rows of a relative position bias that all layers share, [buckets, H] (T5, Raffel et al. 2020;
        MPNet); 0 for none.
      relative_distance: the distance from which all positions share the last bucket.
      head_activation: inside the head; None for `activation`.
      key_value_heads: K, heads of keys and values, each read by H/K query heads; None: H.
      head_width: d; None: D/H.
      attention_bias, output_bias, feed_forward_bias, norm_bias, head_bias: whether the projections of queries, keys and
        values, that of the attention's output, the feed-forward maps, the norms, and the head's transform have biases.
      query_key_norm: an RMS norm over each head's queries and keys (Qwen3).
      causal: tokens see earlier ones only.
      window: in local layers, the largest distance at which tokens see each other; 0: no layer is local.
      local: which layers are; None: all of them when there is a window.
      rotary: rotary positions; None: none.
      patches: images instead of token ids: `vocabulary` is then 0.
      classes: C, of a classifier's head; 2 for answer spans, whose classes are the first and the last token.
      learned_positions: a table of positions is added to the embeddings.
      embedding_norm: the embeddings are normalised.
      gated: the feed-forward is down(activation(gate(x)) * up(x)) (Shazeer 2020).
      norm: "layer" or "rms" (Zhang & Sennrich 2019).
      norm_place: "post", norm(x + f(x)), or "pre", x + f(norm(x)).
      first_norm: whether the first layer's attention has a norm before it, where norms come before.
      final_norm: whether the last layer's output is normalised.
      tied: whether a language-modelling head reads the token table, or has a kernel of its own.

    Raises ValueError on construction when fields contradict each other.
    """

    family: str = "bert"
    vocabulary: int  # V
    width: int  # D
    embedding_width: int | None = None  # E
    layers: int  # L
    heads: int  # H
    key_value_heads: int | None = None  # K
    head_width: int | None = None  # d
    feed_forward_width: int  # F
    positions: int = 512
    position_offset: int = 0
    segments: int = 2
    relative_buckets: int = 0
    relative_distance: int = 128
    activation: str = "gelu"
    norm_epsilon: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02
    pad_token: int = 0
    pooler: bool = True
    head: str = "none"
    head_activation: str | None = None
    attention_bias: bool = True
    output_bias: bool = True
    feed_forward_bias: bool = True
    norm_bias: bool = True
    head_bias: bool = True
    query_key_norm: bool = False
    causal: bool = False
    window: int = 0
    local: tuple[bool, ...] = None  # pyright: ignore[reportAssignmentType]  (None: all, where there is a window)
    rotary: Rotary | None = None
    patches: Patches | None = None
    classes: int = 0
    learned_positions: bool = True
    embedding_norm: bool = True
    gated: bool = False
    norm: str = "layer"
    norm_place: str = "post"
    first_norm: bool = True
    final_norm: bool = False
    tied: bool = True
    sharing: Sharing = None  # pyright: ignore[reportAssignmentType]  (None: every layer owns its weights)
    formats: tuple[FormatRule, ...] = ()

    def __post_init__(self):
        if self.patches is not None and self.vocabulary != 0:
            raise ValueError(f"config: a model of images has no vocabulary, got {self.vocabulary}")
        sizes = ("width", "layers", "heads", "feed_forward_width", "positions")
        for name in sizes if self.patches is not None else ("vocabulary", *sizes):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"config: {name} must be a positive integer, got {value!r}")
        for field in dataclasses.fields(self):
            kind, value = _SIMPLE.get(str(field.type)), getattr(self, field.name)
            if kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
                raise ValueError(f"config: {field.name} must be of type {field.type}, got {value!r}")
        for name in ("segments", "position_offset", "relative_buckets", "window", "classes"):
            if getattr(self, name) < 0:
                raise ValueError(f"config: {name} must be 0 or more, got {getattr(self, name)}")
        if self.embedding_width is not None and self.embedding_width < 1:
            raise ValueError(f"config: embedding_width must be a positive integer, got {self.embedding_width!r}")
        if self.relative_buckets and (
            self.relative_buckets % 4 or self.relative_distance <= self.relative_buckets // 4
        ):
            raise ValueError(
                f"config: relative_buckets must be a multiple of 4 with relative_distance above a quarter of it, got "
                f"{self.relative_buckets} and {self.relative_distance}"
            )
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"config: width {self.width} is not divisible by heads {self.heads}")
        for name in ("key_value_heads", "head_width"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"config: {name} must be a positive integer, got {value!r}")
        if self.heads % self.groups:
            raise ValueError(f"config: heads {self.heads} are not divisible by key_value_heads {self.groups}")
        if self.rotary is not None and self.head_dim % 2:
            raise ValueError(f"config: rotary positions turn pairs, but a head is {self.head_dim} wide")
        for name, known in (("norm", NORMS), ("norm_place", NORM_PLACES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"config: unknown {name} {getattr(self, name)!r}; {closest(getattr(self, name), known)}"
                )
        local = (self.window > 0,) * self.layers if self.local is None else tuple(bool(x) for x in self.local)
        object.__setattr__(self, "local", local)
        if len(local) != self.layers:
            raise ValueError(f"config: local needs one entry for each of {self.layers} layers, got {len(local)}")
        if any(local) != (self.window > 0):
            raise ValueError(f"config: window {self.window} with {sum(local)} local layers: give both or none")
        if not self.first_norm and self.norm_place != "pre":
            raise ValueError("config: first_norm=False makes sense with norm_place='pre' only")
        for name in (self.activation, self.head_activation or self.activation):
            if name not in ACTIVATIONS:
                raise ValueError(f"config: unknown activation {name!r}; {closest(name, ACTIVATIONS)}")
        if self.head not in HEADS:
            raise ValueError(f"config: unknown head {self.head!r}; {closest(self.head, HEADS)}")
        if not self.norm_epsilon > 0:
            raise ValueError(f"config: norm_epsilon must be positive, got {self.norm_epsilon}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"config: {name} must lie in [0, 1), got {getattr(self, name)}")
        if self.head in CLASSIFIERS and not self.classes:
            raise ValueError(f"config: a head {self.head!r} needs classes, the number of classes")
        if self.patches is None and not 0 <= self.pad_token < self.vocabulary:
            raise ValueError(f"config: pad_token {self.pad_token} lies outside the vocabulary of {self.vocabulary}")
        if self.sharing is None:
            object.__setattr__(self, "sharing", Sharing.own(self.layers))
        if len(self.sharing.attention) != self.layers:
            raise ValueError(f"sharing: the maps have {len(self.sharing.attention)} entries for {self.layers} layers")
        object.__setattr__(self, "formats", tuple(self.formats))

    @property
    def head_dim(self) -> int:
        """d, the width of one attention head."""
        return self.head_width or self.width // self.heads

    @property
    def groups(self) -> int:
        """K, the number of key and value heads."""
        return self.key_value_heads or self.heads

    @property
    def table_width(self) -> int:
        """E, the width of the embedding tables."""
        return self.embedding_width or self.width

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, validated again."""
        if len(set(self.local)) == 1 and "local" not in changes:  # all layers alike, whatever their number
            changes["local"] = None
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
        out["local"] = list(self.local)
        out["patches"] = None if self.patches is None else dataclasses.asdict(self.patches)
        out["rotary"] = None if self.rotary is None else dataclasses.asdict(self.rotary)
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
        for name, part in (("rotary", Rotary), ("patches", Patches)):
            if values.get(name) is not None:
                reject_unknown(f"config/{name}", values[name], (f.name for f in dataclasses.fields(part)))
                values[name] = part(**values[name])
        rules = values.get("formats", ())
        if not isinstance(rules, (list, tuple)):
            raise ValueError(f"config/formats: expected a list of [pattern, format], got {rules!r}")
        for rule in rules:
            if not isinstance(rule, (list, tuple)) or len(rule) != 2:
                raise ValueError(f"config/formats: a rule is [pattern, format], got {rule!r}")
        values["formats"] = tuple(FormatRule(pattern=p, spec=s) for p, s in rules)
        return cls(**values)
