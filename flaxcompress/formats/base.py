"""What a weight format is: a pytree node standing where a dense matrix would, and the spec that describes it.

A dense matrix is a plain array; every other format is a `Format` node. Modules and methods call the functions of this
file and know no format by name. A matrix is a *kernel* [n, m] (multiplied: x @ W) or a *table* [V, D] (rows looked up).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer

from flaxcompress.config import ModelConfig, closest, reject_unknown

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
STORAGE_DTYPES = ("float32", "float16", "bfloat16")


class Format:
    """A matrix that is not stored dense. Leaves are exactly the stored tensors; everything else is static."""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix that this node stands for."""
        raise NotImplementedError(f"{type(self).__name__}.shape")

    def matmul(self, x: Float[Array, "*B n"]) -> Float[Array, "*B m"]:
        """x @ W."""
        raise NotImplementedError(f"{type(self).__name__}.matmul: this format stores tables only")

    def attend(self, x: Float[Array, "*B m"]) -> Float[Array, "*B n"]:
        """x @ Wᵀ, as a tied output head needs."""
        raise NotImplementedError(f"{type(self).__name__}.attend")

    def take(self, ids: Integer[Array, "*B"]) -> Float[Array, "*B m"]:
        """Rows of W, without rebuilding it."""
        raise NotImplementedError(f"{type(self).__name__}.take")

    def materialize(self) -> Float[Array, "n m"]:
        """W as a dense float32 matrix."""
        raise NotImplementedError(f"{type(self).__name__}.materialize")

    def spec(self) -> Spec:
        """The spec that describes this node; `spec().init` makes one of equal structure."""
        raise NotImplementedError(f"{type(self).__name__}.spec")

    def select(self, ids: Integer[np.ndarray, " k"], axis: int) -> Format:
        """The rows `ids` of W (`axis` 0), or its columns (1), in this format, their values unchanged."""
        raise NotImplementedError(f"{type(self).__name__}.select")

    def parts(self) -> tuple[Part, ...]:
        """The matrices that this one is composed of; none for a format that holds its values itself."""
        return ()

    def with_parts(self, nodes: Sequence[Any]) -> Format:
        """The same composition of other matrices of the same shapes, in the order of `parts`."""
        raise NotImplementedError(f"{type(self).__name__}.with_parts")

    def part_targets(self, dense: Float[np.ndarray, "n m"]) -> list[np.ndarray | None]:
        """What each part should approximate for the whole to approximate `dense`; None where nothing is known."""
        del dense
        return [None] * len(self.parts())

    def axes(self, rows: str | None, columns: str | None) -> Any:
        """This node with the logical axes of every leaf's last dimensions in its place, as partition specs.

        Args:
          rows, columns: the logical axes of the matrix that this node stands for.
        """
        raise NotImplementedError(f"{type(self).__name__}.axes")

    def matmul_flops(self) -> int:
        """Floating-point operations of `matmul` per row of x."""
        n, m = self.shape
        return 2 * n * m

    def take_flops(self) -> int:
        """Floating-point operations of `take` per row."""
        return 0


class Part(NamedTuple):
    """A matrix inside a composed one; `table`: its rows are looked up where the whole's rows are."""

    node: Any
    table: bool


def map_parts(node: Any, change: Callable[[Any, bool], Any], *, table: bool) -> Any:
    """Replaces every innermost matrix of a (composed) one by `change(matrix, whether it is a table)`."""
    if isinstance(node, Format) and (parts := node.parts()):
        return node.with_parts([map_parts(p.node, change, table=table and p.table) for p in parts])
    return change(node, table)


@dataclasses.dataclass(frozen=True)
class Spec:
    """A format's description: what JSON holds, and how a node of it is made."""

    kind: ClassVar[str]

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str) -> Spec:
        """Reads the JSON object; the default takes the dataclass's own fields."""
        names = {f.name for f in dataclasses.fields(cls)}
        reject_unknown(where, (k for k in data if k != "kind"), names)
        try:
            return cls(**{k: v for k, v in data.items() if k != "kind"})
        except TypeError as error:
            raise ValueError(f"{where}: {cls.kind} format: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `parse` reads."""
        return {"kind": self.kind, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}

    def init(self, key: jax.Array, shape: tuple[int, int], initializer: Initializer, *, table: bool) -> Any:
        """A random node of this format; `jax.eval_shape` of it is the abstract node that loading fills."""
        raise NotImplementedError(f"{type(self).__name__}.init")


_KINDS: dict[str, type[Spec]] = {}


_SpecType = TypeVar("_SpecType", bound=type[Spec])


def register(spec: _SpecType) -> _SpecType:
    """Class decorator: makes `spec.kind` readable from JSON."""
    _KINDS[spec.kind] = spec
    return spec


def parse_spec(data: Mapping[str, Any] | None, where: str = "format") -> Spec:
    """JSON object -> spec; None is dense float32. Raises ValueError for unknown kinds, keys and values."""
    if data is None:
        return DenseSpec()
    if isinstance(data, Spec):
        return data
    if not isinstance(data, Mapping) or data.get("kind") not in _KINDS:
        kind = data.get("kind") if isinstance(data, Mapping) else data
        raise ValueError(f"{where}: unknown format {kind!r}; {closest(str(kind), _KINDS)}")
    return _KINDS[data["kind"]].parse(data, where)


def spec_for(config: ModelConfig, address: str) -> Spec:
    """The format of the matrix at `address`."""
    return parse_spec(config.format_rule(address), address)


def vector_init(config: ModelConfig, address: str, initializer: Initializer) -> Initializer:
    """An initializer for a bias or a norm's scale: `initializer`, stored in the dtype of the address's rule."""
    spec = spec_for(config, address)
    if not isinstance(spec, DenseSpec):
        raise ValueError(f"{address}: a vector can only be stored dense, not as {spec.kind!r}")
    return lambda key, shape, dtype=jnp.float32: initializer(key, shape, jnp.float32).astype(spec.dtype)


@register
@dataclasses.dataclass(frozen=True)
class DenseSpec(Spec):
    """A plain array, stored in `dtype`."""

    kind: ClassVar[str] = "dense"
    dtype: str = "float32"

    def __post_init__(self):
        if self.dtype not in STORAGE_DTYPES:
            raise ValueError(f"dense format: dtype {self.dtype!r}; {closest(str(self.dtype), STORAGE_DTYPES)}")

    def init(self, key, shape, initializer, *, table):
        return initializer(key, shape, jnp.float32).astype(self.dtype)


def check_dtype(value: Any, where: str) -> None:
    """Raises ValueError unless `value` names a floating-point storage dtype."""
    if value not in STORAGE_DTYPES:
        raise ValueError(f"{where}: dtype {value!r}; {closest(str(value), STORAGE_DTYPES)}")


def dot(x: Array, w: Array, contract: int) -> Array:
    """x contracted over its last axis with axis `contract` of the matrix w, accumulated in float32, in x's dtype."""
    flat = x.reshape(-1, x.shape[-1])
    dims = (((1,), (contract,)), ((), ()))
    y = jax.lax.dot_general(flat, w.astype(x.dtype), dims, preferred_element_type=jnp.float32)
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


def matmul(x: Float[Array, "*B n"], w: Any) -> Float[Array, "*B m"]:
    """x @ W for any format; the result has x's dtype."""
    return w.matmul(x) if isinstance(w, Format) else dot(x, w, 0)


def attend(x: Float[Array, "*B m"], w: Any) -> Float[Array, "*B n"]:
    """x @ Wᵀ for any format."""
    return w.attend(x) if isinstance(w, Format) else dot(x, w, 1)


def take(w: Any, ids: Integer[Array, "*B"]) -> Float[Array, "*B D"]:
    """Rows of a table in any format, in float32."""
    if isinstance(w, Format):
        return w.take(ids)
    return jnp.take(w, ids, axis=0, mode="clip").astype(jnp.float32)


def select(w: Any, ids: Integer[np.ndarray, " k"], axis: int) -> Any:
    """Some rows of a matrix or a vector (`axis` 0), or columns (1), in their format, values unchanged."""
    return w.select(ids, axis) if isinstance(w, Format) else jnp.take(w, ids, axis=axis)


@jax.jit  # outside of traced code, one program instead of dozens of small ones
def materialize(w: Any) -> Float[Array, "n m"]:
    """The dense float32 matrix that `w` stands for."""
    return w.materialize() if isinstance(w, Format) else jnp.asarray(w, jnp.float32)


def dense(w: Any) -> Any:
    """`w` itself when it is a float32 array already, else the dense float32 matrix that it stands for."""
    if isinstance(w, Format):
        return materialize(w)
    return w if w.dtype == jnp.float32 else w.astype(jnp.float32)


def axes(w: Any, rows: str | None, columns: str | None) -> Any:
    """`w` with the logical axes of every leaf in its place (see `Format.axes`); stacks have dimensions before those."""
    return w.axes(rows, columns) if isinstance(w, Format) else PartitionSpec(rows, columns)


def nbytes(w: Any) -> int:
    """Bytes of the stored tensors."""
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(w))


def matmul_flops(w: Any) -> int:
    """Floating-point operations of `matmul` per row of x."""
    return w.matmul_flops() if isinstance(w, Format) else 2 * int(np.prod(w.shape))


def take_flops(w: Any) -> int:
    """Floating-point operations of `take` per row."""
    return w.take_flops() if isinstance(w, Format) else 0


def stored_values(w: Any) -> int:
    """How many weights `w` stores, packed integers counted one by one, scales and codebooks included."""
    if hasattr(w, "stored_values"):
        return w.stored_values()
    if isinstance(w, Format):
        children = jax.tree.leaves(w, is_leaf=lambda node: isinstance(node, Format) and node is not w)
        return sum(stored_values(child) for child in children)
    return int(np.prod(w.shape))


def spec_of(w: Any) -> Spec:
    """The spec that describes a matrix in any format."""
    return w.spec() if isinstance(w, Format) else DenseSpec(str(w.dtype))


def _name(entry: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    raise TypeError(f"no name for the tree key {entry!r}")


def to_tensors(w: Any, address: str) -> dict[str, Any]:
    """{tensor name: array} of one matrix: `address` itself when dense, `address.left.values` and so on otherwise."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(w)
    return {".".join([address, *map(_name, path)]): leaf for path, leaf in leaves}


def from_tensors(abstract: Any, address: str, get: Callable[[str], Any]) -> Any:
    """Fills an abstract node from named tensors, the inverse of `to_tensors`."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    return structure.unflatten([get(".".join([address, *map(_name, path)])) for path, _ in leaves])
