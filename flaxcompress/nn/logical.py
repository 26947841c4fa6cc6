"""Which mesh axis each dimension of weights and activations is cut along, and the constraint that says so.

Dimensions have logical names; `RULES` give each the mesh axes that it may be cut along. A mesh axis cuts one dimension
of an array: the earlier rule's. An axis that does not divide the dimension is left out, so that an array may end up
whole on every device. Tensor parallelism is Megatron's (Shoeybi et al. 2019, §3): projections into heads and
feed-forward widths are cut by columns, those out of them by rows; "fsdp" cuts what is left of each weight (ZeRO-3,
Rajbhandari et al. 2020) and, with "data" and "dcn", the batch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

from flaxcompress import formats, tree
from flaxcompress.config import ModelConfig

BATCH = ("dcn", "data", "fsdp")  # the mesh axes that examples are cut along
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("batch", BATCH),
    ("heads", ("model",)),
    ("kv_heads", ("model",)),
    ("mlp", ("model",)),
    ("vocab", ("model",)),
    ("embed", ("fsdp",)),
    ("latent", ("fsdp",)),
    ("core", ("fsdp",)),
    ("rank", ("model", "fsdp")),  # of a low-rank factor: whichever its other dimension leaves
    ("length", ("sequence",)),
    ("logit_length", ("sequence", "model")),  # "model" where it does not divide the vocabulary
)
# A matrix that "fsdp" could not cut so, for example because of an odd rank, is cut by it wherever it divides.
WEIGHT_RULES = RULES + tuple((name, ("fsdp",)) for name in ("mlp", "heads", "kv_heads", "vocab"))

# (rows, columns) of a linear map in a layer, by its name, and of matrices elsewhere, by a pattern of their addresses.
_MAPS: dict[str, tuple[str | None, str | None]] = {
    "query": ("embed", "heads"),
    "key": ("embed", "kv_heads"),
    "value": ("embed", "kv_heads"),
    "output": ("heads", "embed"),
    "query_latent": ("embed", "latent"),
    "latent": ("embed", "latent"),
    "expand": ("latent", "heads"),
    "up": ("embed", "mlp"),
    "gate": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "prefix": (None, "kv_heads"),
}
_ELSEWHERE: tuple[tuple[str, tuple[str | None, str | None]], ...] = (
    (r"embedding/token", ("vocab", "embed")),
    (r"(decoder/)?embedding/(position|segment)|embedding/(projection|patch)/kernel", (None, "embed")),
    (r"head/(output/.*|bias)", ("embed", "vocab")),
    (r"(decoder/)?relative_bias/table", (None, "heads")),
)
_REST = ("embed", None)
_CUT_VECTORS = ("heads", "kv_heads", "mlp", "vocab")


def matrix_axes(address: str) -> tuple[str | None, str | None]:
    """The logical axes (rows, columns) of the matrix at an address; a bias has its matrix's columns."""
    if (place := tree.place(address)) is not None:
        *_, name, last = ["", *place.path.split("/")]
        rows, columns = _MAPS.get(name, _REST)
        if place.part == "deltas":
            return {"down": (rows, "rank"), "up": ("rank", columns)}.get(last, (rows, columns))
        if place.part == "bases":
            return rows, "rank"
        return rows, columns
    return next((axes for pattern, axes in _ELSEWHERE if re.fullmatch(pattern, address)), _REST)


def weight_axes(address: str, node: Any) -> Any:
    """The tree of `node` (which may be stacked) with the logical axes of every leaf, as partition specs."""
    rows, columns = matrix_axes(address)
    vector = not isinstance(node, formats.Format) and len(node.shape) - (tree.place(address) is not None) == 1
    if vector:
        return PartitionSpec(columns if columns in _CUT_VECTORS else None)
    axes = formats.axes(node, rows, columns)
    if rows != "vocab":
        return axes
    # "model" cuts a table's rows already; what is read of them would be cut again by the inner dimension.
    return jax.tree.map(lambda names: PartitionSpec(*("latent" if n == "rank" else n for n in names)), axes)


def cut(
    axes: Any, shape: tuple[int, ...], sizes: Mapping[str, int], rules: Any = RULES, whole: tuple[str, ...] = ()
) -> PartitionSpec:
    """The partition spec of an array of `shape`; `axes` name its last dimensions, those before are not cut.

    Args:
      sizes: of the mesh's axes.
      whole: logical names whose dimensions are not cut here.
    """
    axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
    found: list[tuple[str, ...]] = [() for _ in axes]
    used: set[str] = set()
    for logical, candidates in rules:
        for number, name in enumerate(axes):
            if name != logical or name in whole:
                continue
            for axis in candidates:
                parts = math.prod(sizes[a] for a in found[number]) * sizes.get(axis, 1)
                if sizes.get(axis, 1) > 1 and axis not in used and shape[number] % parts == 0:
                    found[number] += (axis,)
                    used.add(axis)
    return PartitionSpec(*(None if not f else f[0] if len(f) == 1 else f for f in found))


def weight_specs(config: ModelConfig, address: str, node: Any, sizes: Mapping[str, int]) -> Any:
    """The partition spec of every leaf of the matrix at `address`, which may be stacked.

    Args:
      config: of the stack that the address is in: heads of keys and values that "model" does not divide stay whole.
    """
    whole = ("kv_heads",) if config.groups % sizes.get("model", 1) else ()
    axes = weight_axes(address, node)
    rules = lambda names: RULES if len(names) < 2 else WEIGHT_RULES  # noqa: E731
    return jax.tree.map(lambda leaf, names: cut(names, leaf.shape, sizes, rules(names), whole), node, axes)


def _mesh_sizes() -> dict[str, int]:
    """The sizes of the mesh's axes where our rules are in force (see `train/sharding.py`), else nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty or nn.get_logical_axis_rules() != RULES else dict(mesh.shape)


def constrain(x: Any, *axes: str | None) -> Any:
    """x, cut by the logical names of its dimensions (None: whole); x itself where no rules are in force."""
    if not (sizes := _mesh_sizes()):
        return x
    assert len(axes) == x.ndim
    return jax.lax.with_sharding_constraint(x, cut(axes, x.shape, sizes))


def model_cuts() -> int:
    """Into how many stretches the columns of heads and feed-forward widths are cut."""
    return _mesh_sizes().get("model", 1)


def is_on_mesh() -> bool:
    """Whether a mesh may cut arrays."""
    return bool(_mesh_sizes())


def is_cut_by_fsdp() -> bool:
    """Whether weights have to be put together where they are used."""
    return _mesh_sizes().get("fsdp", 1) > 1


def put_together(config: ModelConfig, address: str, node: Any, dtype: Any = None) -> Any:
    """The matrix at `address` as it is used: whole, but for its cuts along "model"; `node` itself without a mesh.

    Left to itself, GSPMD may move activations to the weights' cuts instead.

    Args:
      dtype: what it is multiplied in, so that half the bytes travel; None leaves it alone.
    """
    if not is_cut_by_fsdp():
        return node
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), node)
    in_layer = tree.place(address) is not None
    specs = weight_specs(config, address, stacked if in_layer else node, {**_mesh_sizes(), "fsdp": 1})
    cast = lambda part, _: part if dtype is None or not isinstance(part, jax.Array) else part.astype(dtype)  # noqa: E731

    def whole(leaf: Any, spec: PartitionSpec) -> Any:
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*spec[1:]) if in_layer else spec)

    return jax.tree.map(whole, formats.map_parts(node, cast, table=False), specs)


def multiplied(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` of x and weights, which it puts together: a gradient does that again instead of keeping them.

    All layers' at once would be a whole model on every device. What is multiplied is kept, as without a mesh. Where the
    layer is computed again anyway, its weights serve both that and the gradient: so merging is not prevented.
    """
    if not is_cut_by_fsdp():
        return function(*arguments)
    return jax.checkpoint(function, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False)(*arguments)


def part_put_together(config: ModelConfig, at: str, weights: Any) -> Any:
    """`put_together` of all matrices of a layer's part, whose addresses begin with `at`.

    Outside of a loop over layers that use the same weights, so that it happens once and not once per layer. In the
    dtype that they are stored in: the loop sums their gradients.
    """
    if not is_cut_by_fsdp():
        return weights
    return tree.nest({p: put_together(config, f"{at}/{p}", node) for p, node in tree.walk(weights, "")})
