"""What a model costs, part by part: weights stored, bytes, floating-point operations per token."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax

from flaxcompress import tree
from flaxcompress.config import GENERATING, ModelConfig
from flaxcompress.encoding import compute_dtype
from flaxcompress.formats import Decomposed, matmul_flops, nbytes, spec_of, stored_values, take_flops
from flaxcompress.model import Model
from flaxcompress.nn import init_cache
from flaxcompress.nn.attention_kinds import attention_kind
from flaxcompress.nn.cross_attention import CrossAttention

REST = "norms and biases"
_PARTS = (  # the first full match decides; what matches none is `REST`
    ("token table", r"embedding/token"),
    ("positions and segments", r"embedding/(position|segment)"),
    ("patches", r"embedding/patch/kernel"),
    ("attention", r"layers/\d+/attention/.*/(kernel|taps|table)|sequence/table"),
    ("feed_forward", r"layers/\d+/feed_forward/.*/(kernel|taps)"),
    ("deltas", r"layers/\d+/deltas/.*"),
    ("bases", r"layers/\d+/bases/.*"),
    ("decoder attention", r"decoder/layers/\d+/attention/.*/(kernel|taps)"),
    ("decoder cross-attention", r"decoder/layers/\d+/cross_attention/.*/kernel"),
    ("decoder feed_forward", r"decoder/layers/\d+/feed_forward/.*/(kernel|taps)"),
    ("decoder deltas", r"decoder/layers/\d+/deltas/.*"),
    ("decoder bases", r"decoder/layers/\d+/bases/.*"),
    (REST, r"(decoder/)?(layers/.*|embedding/.*|final_norm/.*)"),
    ("relative positions", r"(decoder/)?relative_bias/.*"),
    ("pooler", r"pooler/.*"),
    ("head", r"head/.*"),
)
# What `core_flops` counts, since it is not multiplied with every token; and bases, which the kernels on them count.
_NOT_HERE = r"(.*/)?(key_|value_)?sequence/table|.*/attention/convolution/taps|.*/bases/.*"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartCost:
    """One part of a model.

    Attributes:
      weights: how many weights are stored, scales and codebooks included; a shared set once.
      bytes: of the stored tensors; a shared set once.
      flops_per_token: of its matrix products (a multiply-add is two), a shared set every time it is used; element-wise
        work is not counted. An encoder's are per token of the source, a decoder's per token of the target.
      format: how its matrices are stored, in words.
    """

    part: str
    weights: int
    bytes: int
    flops_per_token: float
    format: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """The cost of every part of a model, at sequences of `length` tokens."""

    name: str
    length: int
    parts: tuple[PartCost, ...]
    cache_bytes_per_token: int = 0

    @property
    def params(self) -> int:
        """Weights stored."""
        return sum(part.weights for part in self.parts)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.bytes for part in self.parts)

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations per token."""
        return sum(part.flops_per_token for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """A JSON object: totals, then the parts."""
        return {
            "name": self.name,
            "length": self.length,
            "params": self.params,
            "bytes": self.bytes,
            "flops_per_token": self.flops_per_token,
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "parts": [dataclasses.asdict(part) for part in self.parts],
        }

    def table(self):
        """A `rich.table.Table` of the parts and their totals."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.name), show_footer=True)
        table.add_column("part", footer="total")
        for header, total in (
            ("weights", f"{self.params:,}"),
            ("MB", f"{self.bytes / 1e6:.3f}"),
            ("share", ""),
            ("FLOPs per token", f"{self.flops_per_token:,.0f}"),
        ):
            table.add_column(header, footer=total, justify="right", no_wrap=True)
        table.add_column("format", footer=f"{self.length} tokens, {self.cache_bytes_per_token:,} cache bytes per token")
        for part in self.parts:
            share = part.bytes / max(self.bytes, 1)
            flops = f"{part.flops_per_token:,.0f}" if part.flops_per_token else "–"
            cells = [part.part, f"{part.weights:,}", f"{part.bytes / 1e6:.3f}", f"{share:.0%}", flops, part.format]
            table.add_row(*map(Text, cells))
        return table


def profile(model: Model, *, length: int = 128) -> Profile:
    """Counts what `model` stores and computes; its params may be abstract (`jax.eval_shape`), nothing is run.

    Args:
      length: T, the tokens of a sequence: full attention's core takes 4·T·H·d operations per token and layer (as if
        every token saw all others, as the plain implementation computes it; see `core_flops` for the other kinds), the
        pooler runs once per sequence. An encoder's and its decoder's sequences are taken to be equally long.

    Raises ValueError for a length outside 1 … positions.
    """
    config = model.config
    if not 1 <= length <= config.positions:
        raise ValueError(f"profile: length must lie in 1 … {config.positions} (the model's positions), got {length}")
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model.params)
    nodes = tree.View(abstract)
    members: dict[str, dict[str, Any]] = {}
    for address, node in nodes.items():
        members.setdefault(part_of(address), {})[address] = node
    rows = []
    for part in [name for name, _ in _PARTS if name in members]:
        flops = sum(_flops(config, address, node, length) for address, node in members[part].items())
        if part == "attention":
            flops += config.layers * attention_kind(config).core_flops(config, length)
        elif part.endswith("attention") and (decoder := config.decoder) is not None:
            kind = attention_kind(decoder) if part == "decoder attention" else CrossAttention
            flops += decoder.layers * kind.core_flops(decoder, length)
        if part == "head" and has_tied_output(config):
            flops += matmul_flops(nodes["embedding/token"])
        rows.append(
            PartCost(
                part=part,
                weights=sum(map(stored_values, members[part].values())),
                bytes=sum(map(nbytes, members[part].values())),
                flops_per_token=float(flops),
                format=_formats(members[part]),
            )
        )
    if "head" not in members and has_tied_output(config):  # a head without weights of its own
        flops = float(matmul_flops(nodes["embedding/token"]))
        rows.append(PartCost(part="head", weights=0, bytes=0, flops_per_token=flops, format="the token table"))
    return Profile(
        name=model.assets.source or f"{config.family} model",
        length=length,
        parts=tuple(rows),
        cache_bytes_per_token=cache_bytes(config),
    )


def cache_bytes(config: ModelConfig) -> int:
    """Bytes that the cache grows by with a token, in the compute dtype; 0 for models without one.

    In a model with a decoder: with a token of the target; what the cache holds of the source does not grow.
    """
    if not (config.decoder or config).causal:
        return 0
    one, two = (jax.eval_shape(lambda n=n: init_cache(config, 1, n, compute_dtype()).layers) for n in (1, 2))
    return nbytes(two) - nbytes(one)


def has_tied_output(config: ModelConfig) -> bool:
    """Whether logits are x @ tableᵀ, the token table's."""
    return config.head in ("masked_lm", "pretraining") or (config.head in GENERATING and config.tied)


def part_of(address: str) -> str:
    """The part of the model that the parameter at `address` belongs to, as `PartCost.part` names it."""
    return next((name for name, pattern in _PARTS if re.fullmatch(pattern, address)), REST)


def _flops(config: ModelConfig, address: str, node: Any, length: int) -> float:
    if len(node.shape) != 2 or re.fullmatch(_NOT_HERE, address):
        return 0.0
    if re.fullmatch(r"(decoder/)?(embedding/(token|position|segment)|relative_bias/table)", address):
        return take_flops(node)
    if address.startswith("pooler/"):
        return matmul_flops(node) / length
    if (at := tree.place(address)) is not None:
        sharing = config.decoder.sharing if at.stack and config.decoder else config.sharing
        return getattr(sharing, at.part).count(at.number) * matmul_flops(node)
    return matmul_flops(node)


def _formats(nodes: Mapping[str, Any]) -> str:
    matrices = {address: node for address, node in nodes.items() if len(node.shape) == 2} or nodes
    counts = Counter(
        describe(spec_of(node).to_json(), node.shape[-1]) + _applied(address, node)
        for address, node in matrices.items()
    )
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count}× {text}" for text, count in counts.most_common())


def _applied(address: str, node: Any) -> str:
    """How a kernel that is a decomposed tensor is multiplied by; which takes fewer operations for many tokens."""
    if not isinstance(node, Decomposed) or not address.endswith("/kernel"):
        return ""
    return ", decomposed" if node.stays_decomposed(math.inf) else ", multiplied back"


def describe(spec: Mapping[str, Any], columns: int | None = None) -> str:
    """A format's spec in words: "low_rank 96 (int4, g32)", "bucketed 9500×384 int4 + 21022×96 int3", "dense float32".

    Args:
      columns: the width of the matrix, for tiers that are stored at full rank.
    """
    kind = spec.get("kind")
    if kind == "dense":
        return f"dense {spec['dtype']}"
    if kind == "quantized":
        return f"int{spec['bits']}" + (f", g{spec['group']}" if spec["group"] else "")
    if kind == "low_rank":
        factors = dict.fromkeys(describe(spec[side]).removeprefix("dense ") for side in ("left", "right"))
        return f"low_rank {spec['rank']} ({' · '.join(factors)})"
    if kind == "bucketed":
        return "bucketed " + " + ".join(_tier(tier, columns) for tier in spec["tiers"])
    if kind == "banded":
        return "banded " + " ".join(f"{columns}@{bits}" for columns, bits in spec["bands"])
    if kind in ("tensor_train", "cp", "tucker"):
        sizes = ("·".join(map(str, spec[side])) for side in ("rows", "columns"))
        ranks = [spec["rank"]] if kind == "cp" else spec["ranks"]
        shown = "·".join(map(str, ranks)) if kind == "tucker" else max(ranks)
        return f"{kind} {'×'.join(sizes)}, rank {shown}"
    plain = (f"{k} {v}" for k, v in spec.items() if k != "kind" and isinstance(v, (int, float, str)))
    return " ".join([str(kind), *plain])


def _tier(tier: Mapping[str, Any], columns: int | None) -> str:
    spec = tier["format"]
    width = spec.get("rank") or columns
    inner = spec["left"] if spec["kind"] == "low_rank" else spec
    size = f"{tier['rows']}×{width}" if width else f"{tier['rows']} rows"
    return f"{size} {describe(inner).removeprefix('dense ').split(',')[0]}"
