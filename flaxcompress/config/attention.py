"""Kinds of self-attention other than the full one. A new kind is one class and one entry in `ATTENTION_KINDS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flaxcompress.config.names import closest
from flaxcompress.config.part import Part, part_reader

LINFORMER_SHARING = ("none", "head", "key_value", "layer")


class AttentionKind(Part):
    """Base of the kinds: JSON holds the fields and the name.

    Attributes:
      kind: the name.
      refuses: {field of the model's config: (the values that go with this kind)}.
    """

    kind: ClassVar[str]
    refuses: ClassVar[dict[str, tuple[Any, ...]]]

    def to_json(self) -> dict[str, Any]:
        """The object that `read_attention` reads."""
        return {"kind": self.kind, **super().to_json()}

    def check(self, config: Any) -> None:
        """Raises ValueError where the model's other fields contradict this kind."""
        for name, allowed in self.refuses.items():
            if (value := getattr(config, name)) not in allowed:
                only = " or ".join(map(repr, allowed))
                raise ValueError(f"config: {self.kind} attention goes with {name}={only} only, got {value!r}")

    def _check_sizes(self, least: Mapping[str, int]) -> None:
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"attention: {name} must be an integer of {low} or more, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent(AttentionKind):
    """Multi-head latent attention (DeepSeek-V2, 2024, §2.1): keys and values of all heads come from one narrow vector.

    A key is a part of each head's own, and a part with rotary positions that all heads share; decoding keeps the latent
    and the shared part alone.

    Attributes:
      query_rank: width of the queries' latent; None: queries are projected at once.
      key_value_rank: width of the latent of keys and values.
      rotary_width: of a head's query and of the shared key, with rotary positions where the model has them; 0: there is
        no shared key.
      plain_width: of a head's query and key, without positions; 0: heads have no keys of their own.
      value_width: of a head's value.
      interleaved: rotary positions turn the pairs (x_2i, x_2i+1) instead of (x_i, x_i+w/2).
      norms: whether the latents have RMS norms.
      norm_epsilon: of these.
      query_bias: whether the map to the queries has a bias, beside those of the maps into latents.
    """

    kind: ClassVar[str] = "latent"
    refuses: ClassVar[dict[str, tuple[Any, ...]]] = {
        "query_key_norm": (False,),
        "query_key_width": (None,),
        "projection_kernel": (0,),
        "prefix_length": (0,),
    }

    query_rank: int | None = None
    key_value_rank: int
    rotary_width: int
    plain_width: int
    value_width: int
    interleaved: bool = False
    norms: bool = True
    norm_epsilon: float = 1e-6
    query_bias: bool = False

    def __post_init__(self):
        self._check_sizes({"key_value_rank": 1, "rotary_width": 0, "plain_width": 0, "value_width": 1})
        if self.query_rank is not None:
            self._check_sizes({"query_rank": 1})
        if not self.rotary_width + self.plain_width:
            raise ValueError("attention: rotary_width and plain_width are both 0, so that queries would have no width")
        if not self.norm_epsilon > 0:
            raise ValueError(f"attention: norm_epsilon must be positive, got {self.norm_epsilon}")

    def check(self, config: Any) -> None:
        super().check(config)
        if config.key_value_heads not in (None, config.heads):
            raise ValueError(
                f"config: in latent attention every head has its own keys, but key_value_heads is "
                f"{config.key_value_heads} and heads is {config.heads}"
            )


_WHOLE_SEQUENCE: dict[str, tuple[Any, ...]] = {
    **{"causal": (False,), "window": (0,), "relative_buckets": (0,)},
    "prefix_length": (0,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linformer(AttentionKind):
    """Keys and values projected along the sequence, from the longest one to `length` places (Wang et al. 2020).

    A shorter sequence uses the projections' first rows. Places of the sequence are mixed, so nothing can be causal,
    have a window, or a bias by position.

    Attributes:
      length: k.
      sharing: "none": every head of every layer has its own projection of keys, and of values; "head": a layer's heads
        share both; "key_value": and both are one; "layer": and all layers share it.
    """

    kind: ClassVar[str] = "linformer"
    refuses: ClassVar[dict[str, tuple[Any, ...]]] = _WHOLE_SEQUENCE

    length: int
    sharing: str = "none"

    def __post_init__(self):
        self._check_sizes({"length": 1})
        if self.sharing not in LINFORMER_SHARING:
            raise ValueError(f"attention: unknown sharing {self.sharing!r}; {closest(self.sharing, LINFORMER_SHARING)}")

    def check(self, config: Any) -> None:
        super().check(config)
        if self.length > config.positions:
            raise ValueError(f"config: linformer's length {self.length} is over the {config.positions} positions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nystrom(AttentionKind):
    """The softmax matrix approximated from landmarks, the means of segments (Nyströmformer, Xiong et al. 2021).

    Attributes:
      landmarks: m, how many segments a sequence is cut into.
      iterations: of the pseudo-inverse.
      convolution: width of a depthwise convolution over the values, odd, added to the result; 0: none.
    """

    kind: ClassVar[str] = "nystrom"
    refuses: ClassVar[dict[str, tuple[Any, ...]]] = _WHOLE_SEQUENCE

    landmarks: int
    iterations: int = 6
    convolution: int = 0

    def __post_init__(self):
        self._check_sizes({"landmarks": 1, "iterations": 1, "convolution": 0})
        if self.convolution and self.convolution % 2 == 0:
            raise ValueError(f"attention: convolution must be odd, so that it has a middle, got {self.convolution}")


ATTENTION_KINDS: dict[str, type[AttentionKind]] = {kind.kind: kind for kind in (Latent, Linformer, Nystrom)}


def read_attention(data: Any, where: str) -> AttentionKind:
    """Reads `AttentionKind.to_json`'s object. Raises ValueError for unknown kinds, and unknown and missing keys."""
    if not isinstance(data, Mapping) or data.get("kind") not in ATTENTION_KINDS:
        kind = data.get("kind") if isinstance(data, Mapping) else data
        raise ValueError(f"{where}: unknown kind of attention {kind!r}; {closest(str(kind), ATTENTION_KINDS)}")
    return part_reader(ATTENTION_KINDS[data["kind"]])({k: v for k, v in data.items() if k != "kind"}, where)
