"""Dropping what nothing reads: positions past the length limit, an unused pooler."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

import jax

from flaxcompress import tree
from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.config import Linformer, ModelConfig
from flaxcompress.formats import materialize
from flaxcompress.model import Model

_PROJECTIONS = r"(.*/)?(key_|value_)?sequence/table"  # of Linformer: they have a row for each position


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class Trim(Step):
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
            for pattern in (r"embedding/(position|segment)", r".*/(scale|bias)"):
                config = config.with_rule(pattern, {"kind": "dense", "dtype": self.dtype})
        return config

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        if (resolved := self.resolve(model)) != self:
            return resolved(model, context, key=key)
        config = self.plan(model.config)
        view = tree.View(model.params)
        changes: dict[str, Any] = {}
        dropped = [a for a in view if self.pooler == "drop" and a.startswith("pooler/")]
        if isinstance(self.positions, int):
            changes["embedding/position"] = materialize(view["embedding/position"])[
                : self.positions + config.position_offset
            ]
            for address in view:
                if re.fullmatch(_PROJECTIONS, address):
                    changes[address] = materialize(view[address])[: self.positions]
        if self.dtype is not None:
            for address in view.keys() - dropped:
                if address in ("embedding/position", "embedding/segment") or address.endswith(("/scale", "/bias")):
                    node = changes.get(address, view[address])
                    changes[address] = materialize(node).astype(self.dtype)
        assets = dataclasses.replace(model.assets, max_length=min(model.assets.max_length, config.positions))
        return Model(params=tree.replace(model.params, changes, drop=dropped), config=config, assets=assets)
