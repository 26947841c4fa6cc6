"""Fewer attention heads: some left out with all that makes and reads them, and the output map fitted to the others."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import numpy as np

from flaxcompress import tree
from flaxcompress.compress.narrow import check_plain, dense_rules, matrices, narrower, with_matrices
from flaxcompress.compress.selection import entries
from flaxcompress.compress.step import Context, register_step
from flaxcompress.compress.structured import StructuredPruning, cut_to
from flaxcompress.compress.uncompressed import check_uncompressed
from flaxcompress.config import ModelConfig
from flaxcompress.model import Model, abstract_flat


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneHeads(StructuredPruning):
    """Leaves out attention heads, as many in every layer but not the same ones, and fits the output map to the others.

    The heads that stay keep their width. In a model whose layers share a relative position bias, which has one column
    a head, the same heads stay in all of them. Of a model with a decoder, the encoder's heads.

    Attributes:
      heads: how many query heads stay, or
      keep: the fraction of them, rounded down to whole units.
      unit: what goes as a whole: a key and value head with the queries that read it ("groups"; where every query has
        its own, that is a head), or of every such group as many query heads ("queries", in grouped-query models only:
        keys and values stay, and so does the cache).
      by, repair, ridge, sentences: see `StructuredPruning`.

    Raises ValueError for a number of heads that does not divide so, and for all of them.
    """

    heads: int | None = None
    keep: float | None = None
    unit: Literal["groups", "queries"] = "groups"

    def _heads(self, config: ModelConfig) -> int:
        check_plain(config, self.name, attention_of_another_kind_than_full=config.attention is not None)
        each = config.heads // config.groups
        if self.unit == "queries" and each == 1:
            raise ValueError(f"{self.name}: every query head has its own keys and values here; use unit: groups")
        multiple = each if self.unit == "groups" else config.groups
        return narrower(self.heads, self.keep, config.heads, self.name, multiple, name="heads")

    def plan(self, config: ModelConfig) -> ModelConfig:
        heads, present = self._heads(config), abstract_flat(config)
        inner = [a for a in present if a.startswith("layers/") and "/attention/" in a]
        check_uncompressed(present, inner, self.name)
        groups = config.groups * heads // config.heads if self.unit == "groups" else config.groups
        stated = None if config.key_value_heads is None else groups  # a query head each, as before
        return dense_rules(config, inner).replace(heads=heads, key_value_heads=stated, head_width=config.head_dim)

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        config, planned = model.config, self.plan(model.config)
        sets = range(config.sharing.sets("attention"))
        readers = {
            f"layers/{number}/attention/output/kernel": (config.heads * config.head_dim, config.width)
            for number in sets
        }
        known = self.statistics(model, context, readers)
        outputs = {a: matrices(model, a.removesuffix("kernel"), self.name)["kernel"] for a in readers}
        together = [tuple(readers)] if config.relative_buckets else [(address,) for address in readers]
        kept: dict[str, np.ndarray] = {}  # query heads, by reader
        for addresses in together:
            heads = self._stay([outputs[a] for a in addresses], [known[a] for a in addresses], config, planned)
            kept |= dict.fromkeys(addresses, heads)
        fitted = {a: self.refitted(outputs[a], known[a], kept[a], config.head_dim) for a in readers}

        def stay(address: str, axis: str | None) -> np.ndarray:
            at = tree.place(address)
            heads = kept[next(iter(readers)) if at is None else f"layers/{at.number}/attention/output/kernel"]
            if at is None:  # the relative bias, a column a head
                return heads
            if axis == "kv_heads":
                heads = np.unique(heads // (config.heads // config.groups))
            return entries(
                heads, config.query_key_dim if at.path.split("/")[0] in ("query", "key") else config.head_dim
            )

        small = cut_to(model, planned, stay)
        return with_matrices(small, small.config, fitted)

    def _stay(self, outputs, known, config: ModelConfig, planned: ModelConfig) -> np.ndarray:
        """The query heads that stay, rising, of weight sets that keep the same ones."""
        each, d = config.heads // config.groups, config.head_dim
        if self.unit == "groups":
            return entries(self.chosen(outputs, known, planned.groups, each * d), each)
        left = planned.heads // planned.groups
        found = []
        for group in range(config.groups):
            rows = slice(group * each * d, (group + 1) * each * d)
            parts = [dataclasses.replace(one, **_rows(one, rows)) for one in known]
            found.append(group * each + self.chosen([w[rows] for w in outputs], parts, left, d))
        return np.concatenate(found)


def _rows(known, rows: slice) -> dict[str, np.ndarray]:
    """The statistics of some of a reader's inputs."""
    out = {}
    if known.input_moments is not None:
        out["input_moments"] = known.input_moments[rows, rows]
    if known.fisher is not None:
        out["fisher"] = known.fisher[rows]
    return out
