"""Dropping what nothing reads: positions past the length limit, an unused pooler."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax

from flaxcompress import tree
from flaxcompress.compress.layer_step import Changes, LayerStep, gathered, unfinished
from flaxcompress.compress.step import Context, register_step
from flaxcompress.config import Linformer, ModelConfig
from flaxcompress.formats import materialize
from flaxcompress.model import Model, abstract_flat

_PROJECTIONS = r"(.*/)?(key_|value_)?sequence/table"  # of Linformer: they have a row for each position
_SMALL = (r"embedding/(position|segment)", r".*/(scale|bias)")


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class Trim(LayerStep):
    """Cuts the positions' tables, drops the pooler, and stores small tables and vectors in 16 bits.

    Attributes:
      positions: rows to keep; "limit" is the checkpoint's length limit, None keeps all. Longer inputs are refused
        afterwards; `encode` cuts them at the limit anyway.
      pooler: "drop", "keep", or "unused": dropped when the checkpoint has a sentence pooling, which never reads it.
      dtype: storage of biases, norms, positions and segments; None leaves them as they are.
    """

    positions: int | Literal["limit"] | None = None
    pooler: Literal["keep", "drop", "unused"] = "keep"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None

    def resolve(self, model: Model) -> Trim:
        positions, pooler = self.positions, self.pooler
        if positions == "limit":
            positions = min(model.assets.max_length, model.config.positions)
        if pooler == "unused":
            pooler = "keep" if model.assets.pooling is None else "drop"
        return dataclasses.replace(self, positions=positions, pooler=pooler)

    def plan(self, config: ModelConfig) -> ModelConfig:
        if isinstance(self.positions, int):
            if not 1 <= self.positions <= config.positions:
                raise ValueError(f"Trim: positions {self.positions} is not in 1 … {config.positions}")
            config = config.replace(positions=self.positions)
            if config.format_rule("embedding/position") is not None:  # the rows that are kept become dense
                config = config.with_format("embedding/position", {"kind": "dense", "dtype": self.dtype or "float32"})
            if isinstance(config.attention, Linformer):
                config = config.with_rule(_PROJECTIONS, {"kind": "dense", "dtype": "float32"})
        if self.pooler == "drop":
            config = config.replace(pooler=False)
        if self.dtype is not None:
            for pattern in _SMALL:
                config = config.with_rule(pattern, {"kind": "dense", "dtype": self.dtype})
        return config

    def by_layer(self, config: ModelConfig, weights: Mapping[str, Any], context: Context) -> Iterator[Changes]:
        for group, addresses in unfinished(abstract_flat(self.plan(config)), context):
            yield group, {a: node for a in addresses if (node := self._trimmed(config, weights, a)) is not None}

    def _trimmed(self, config: ModelConfig, weights: Mapping[str, Any], address: str) -> Any:
        """The matrix at an address after this step; None where that is what it was."""
        node = None
        if isinstance(self.positions, int):
            if address == "embedding/position":
                node = materialize(weights[address])[: self.positions + config.prefix_length + config.position_offset]
            elif re.fullmatch(_PROJECTIONS, address):
                node = materialize(weights[address])[: self.positions]
        if self.dtype is not None and any(re.fullmatch(p, address) for p in _SMALL):
            node = materialize(weights[address] if node is None else node).astype(self.dtype)
        return node

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        if (resolved := self.resolve(model)) != self:
            return resolved(model, context, key=key)
        config, view = self.plan(model.config), tree.View(model.params)
        changes = gathered(self.by_layer(model.config, view, context))
        dropped = [a for a in view if self.pooler == "drop" and a.startswith("pooler/")]
        assets = dataclasses.replace(model.assets, max_length=min(model.assets.max_length, config.positions))
        return Model(params=tree.replace(model.params, changes, drop=dropped), config=config, assets=assets)
