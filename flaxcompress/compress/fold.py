"""Folding: the same function with fewer weights that scale, and fewer factors where their product is smaller."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress import tree
from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.compress.trim import Trim
from flaxcompress.config import ModelConfig
from flaxcompress.formats import Format, LowRank, materialize, nbytes, spec_of
from flaxcompress.model import Model, abstract_flat
from flaxcompress.nn.add_norm import norm_names
from flaxcompress.nn.attention_kinds import attention_kind
from flaxcompress.nn.heads import BY_TOKEN


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class Fold(Step):
    """Rewrites weights without changing what the model computes, but for rounding.

    Attributes:
      norms: scales (and biases) of norms before sublayers go into the linear maps that read them, and become 1 (and 0):
        ready for what treats all of a norm's outputs alike, as rotations and quantization in groups do. A norm stays as
        it is where something else reads it, where readers are shared with layers of another norm, or where one of them
        is stored in a format whose rows cannot be scaled, or has no bias for that of the norm.
      factors: neighbours in products of float32 factors are multiplied where the product has fewer values, so that it
        takes fewer bytes and operations.
      pooler: "unused": dropped when the checkpoint has a sentence pooling and no head reads it; "drop"; or "keep".
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    norms: bool = True
    factors: bool = True
    pooler: Literal["keep", "drop", "unused"] = "unused"

    def resolve(self, model: Model) -> Fold:
        if self.pooler != "unused":
            return self
        pooler = Trim(pooler="unused").resolve(model).pooler if _pooler_is_free(model.config) else "keep"
        return dataclasses.replace(self, pooler=pooler)

    def plan(self, config: ModelConfig) -> ModelConfig:
        if self.pooler == "drop" and not _pooler_is_free(config):
            raise ValueError(f"Fold: the head {config.head!r} reads the pooler's output; it cannot be dropped")
        config = Trim(pooler=self.pooler).plan(config)
        if self.factors:
            for address, node in abstract_flat(config).items():
                if (short := fold_factors(node)) is not node:
                    config = config.with_format(address, spec_of(short).to_json())
        return config

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        if (resolved := self.resolve(model)) != self:
            return resolved(model, context, key=key)
        config = self.plan(model.config)
        model = Trim(pooler=self.pooler)(model, context, key=key)
        flat, changes = tree.View(model.params), {}
        if self.norms:
            changes |= _folded_norms(config, flat, "")
            if config.decoder is not None:
                changes |= _folded_norms(config.decoder, flat, "decoder/")
        if self.factors:
            for address in [a for a in flat if isinstance(flat.stacked(a), LowRank)]:
                node = changes.get(address, flat[address])
                if (short := fold_factors(node)) is not node:
                    changes[address] = short
        return model.replace(params=tree.replace(model.params, changes), config=config)  # pyright: ignore[reportAttributeAccessIssue]


def _pooler_is_free(config: ModelConfig) -> bool:
    """Whether no head reads the pooler's output."""
    return config.head == "none" or (config.head in BY_TOKEN and config.head != "pretraining")


# ── norms ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def norm_readers(config: ModelConfig) -> dict[str, list[str]]:
    """{norm: the linear maps that read it}, of the norms that linear maps alone read: none where norms come after."""
    if config.norm_place == "post":
        return {}
    first = () if config.projection_kernel else attention_kind(config).stages(config)[0]
    attention = [f"attention/{name}" for name in first]
    into = ("up", "gate") if config.gated else ("up",)
    feed = [] if config.feed_forward_kernel else [f"feed_forward/{name}" for name in into]
    if config.parallel == "one_norm":
        found = {"attention": attention + feed if attention and feed else []}
    else:
        found = {"attention": attention, "cross_attention": ["cross_attention/query"], "feed_forward": feed}
    return {norm: readers for norm, readers in found.items() if readers}


def scale_rows(node: Any, scale: np.ndarray) -> Any:
    """diag(scale) · W of a kernel in its own format; None where that cannot be told in it without rounding."""
    if isinstance(node, LowRank):
        left = scale_rows(node.left, scale)
        return None if left is None else LowRank(left=left, right=node.right)
    if isinstance(node, Format) or node.dtype != jnp.float32:
        return None
    return jnp.asarray(np.asarray(node, np.float64) * scale[:, None], jnp.float32)


def _folded_norms(config: ModelConfig, flat: Mapping[str, Any], stack: str) -> dict[str, Any]:
    """The matrices of one stack of layers that change."""
    changes: dict[str, Any] = {}
    for number in range(config.sharing.sets("norms")):
        for norm, readers in norm_readers(config).items():
            if norm in norm_names(config, number):
                changes |= _folded_norm(config, flat, stack, number, norm, readers)
    return changes


def _folded_norm(
    config: ModelConfig, flat: Mapping[str, Any], stack: str, number: int, norm: str, readers: Sequence[str]
) -> dict[str, Any]:
    """The norm and its readers, changed; nothing where that cannot be."""
    at = f"{stack}layers/{number}/norms/{norm}"
    scale = np.asarray(flat[f"{at}/scale"], np.float64)
    bias = np.asarray(flat.get(f"{at}/bias", np.zeros_like(scale)), np.float64)
    if (scale == 1).all() and not bias.any():
        return {}
    users = [layer for layer, used in enumerate(config.sharing.norms) if used == number]
    changes: dict[str, Any] = {f"{at}/scale": jnp.ones_like(flat[f"{at}/scale"])}
    if f"{at}/bias" in flat:
        changes[f"{at}/bias"] = jnp.zeros_like(flat[f"{at}/bias"])
    for reader in readers:
        sets = _own(getattr(config.sharing, reader.split("/")[0]), users)
        deltas = [f"{stack}layers/{d}/deltas/{reader}/down" for d in _own(config.sharing.deltas, users) or ()]
        deltas = [address for address in deltas if address in flat]
        if sets is None or (deltas and bias.any()) or _own(config.sharing.deltas, users) is None:
            return {}
        linears = [f"{stack}layers/{n}/{reader}" for n in sets]
        for address in (*(f"{linear}/kernel" for linear in linears), *deltas):
            changes[address] = scale_rows(flat[address], scale)
            if changes[address] is None:
                return {}
        for linear in linears if bias.any() else ():
            own = flat.get(f"{linear}/bias")
            if own is None or own.dtype != jnp.float32:
                return {}
            moved = bias @ np.asarray(materialize(flat[f"{linear}/kernel"]), np.float64)
            changes[f"{linear}/bias"] = jnp.asarray(np.asarray(own, np.float64) + moved, jnp.float32)
    return changes


def _own(each: Sequence[int], users: Sequence[int]) -> list[int] | None:
    """The weight sets that some layers use; None where other layers, which read another norm, use one too."""
    used = {number for layer, number in enumerate(each) if layer in users}
    others = {number for layer, number in enumerate(each) if layer not in users}
    return None if used & others else sorted(used)


# ── factors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def fold_factors(node: Any) -> Any:
    """The same matrix as the cheapest product of neighbouring factors; `node` itself where nothing is gained.

    Bytes decide: of float32 factors, whose operations per row of x are in proportion. Nodes may be abstract.
    """
    chain = _chain(node)
    best: list[tuple[int, list[Any]]] = [(0, [])]  # of the first factors: bytes, and where the pieces begin
    for last in range(1, len(chain) + 1):
        choices = []
        for first in range(last):
            piece = chain[first:last]
            if len(piece) > 1 and not all(_plain(matrix) for matrix in piece):
                continue
            size = nbytes(piece[0]) if len(piece) == 1 else 4 * piece[0].shape[0] * piece[-1].shape[1]
            choices.append((best[first][0] + size, [*best[first][1], first]))
        best.append(min(choices, key=lambda choice: (choice[0], len(choice[1]))))
    starts = best[-1][1]
    if len(starts) == len(chain):
        return node
    pieces = [_product(chain[a:b]) for a, b in zip(starts, [*starts[1:], len(chain)], strict=True)]
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = LowRank(left=whole, right=piece)
    return whole


def _chain(node: Any) -> list[Any]:
    """The factors of nested products, from left to right."""
    return [*_chain(node.left), *_chain(node.right)] if isinstance(node, LowRank) else [node]


def _plain(matrix: Any) -> bool:
    return not isinstance(matrix, Format) and matrix.dtype == jnp.float32


def _product(matrices: Sequence[Any]) -> Any:
    if len(matrices) == 1:
        return matrices[0]
    if any(isinstance(matrix, jax.ShapeDtypeStruct) for matrix in matrices):
        return jax.ShapeDtypeStruct((matrices[0].shape[0], matrices[-1].shape[1]), jnp.float32)
    return jnp.asarray(np.linalg.multi_dot([np.asarray(matrix, np.float64) for matrix in matrices]), jnp.float32)
