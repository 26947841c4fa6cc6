"""Quantizing kernels and tables: GPTQ layer after layer on compressed inputs, error-minimising or nearest rounding."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from flaxcompress import tree
from flaxcompress.compress.choices import choose
from flaxcompress.compress.layer_step import Changes, LayerStep, unfinished, walked
from flaxcompress.compress.rounding import gptq, round_rows
from flaxcompress.compress.sensitivity import kernel_sensitivities, spec_bytes, spend
from flaxcompress.compress.step import Context, register_step
from flaxcompress.compress.walk import walked_kernels
from flaxcompress.config import ModelConfig
from flaxcompress.formats import (
    CodebookSpec,
    Format,
    FP8Spec,
    LowRank,
    NF4Spec,
    QuantizedSpec,
    RowFormat,
    ScaledSpec,
    map_parts,
    materialize,
)
from flaxcompress.formats.base import spec_of
from flaxcompress.model import Model, abstract_flat
from flaxcompress.nn.bases import BASES, basis_address, is_on_basis

Rounding = Literal["gptq", "mse", "nearest"]
_CODED: dict[str, type[CodebookSpec]] = {"nf4": NF4Spec, "fp8": FP8Spec}
_TABLES = ("embedding/token", "embedding/position", "embedding/segment")


def compress_matrix(
    weight: Any,
    spec: ScaledSpec,
    *,
    table: bool,
    rounding: Rounding = "mse",
    moments: Any = None,
) -> RowFormat:
    """Quantizes a kernel [n, m] (in groups along n) or a table [V, D] (in groups along D).

    Args:
      moments: C = E[xᵀx] of the kernel's input, [n, n]; "gptq" needs it, "mse" weights the error by its diagonal.
    """
    rows = jnp.asarray(weight, jnp.float32)
    rows = rows if table else rows.T
    if rounding == "gptq" and moments is not None:
        levels, scale = gptq(rows, jnp.asarray(moments), spec)
    else:
        kind = "nearest" if rounding == "nearest" else "mse"
        weights = None if moments is None else jnp.diagonal(jnp.asarray(moments))
        levels, scale = round_rows(rows, spec, rounding=kind, weights=weights)
    return spec.pack(levels, scale, transposed=not table)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitsFor:
    """Other bits for the matrices that `pattern` matches in full, and their group: None is the whole row.

    A pattern that matches nothing is an error unless it is `optional`, for recipes that serve several families.
    """

    pattern: str
    bits: int
    group: int | None = None
    optional: bool = False


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize(LayerStep):
    """Stores every matrix that `pattern` matches in a few bits.

    Attributes:
      numbers: "int", integers of `bits`; "nf4", quantiles of a normal distribution in 4 bits (Dettmers et al. 2023); or
        "fp8", floating point (e4m3). `bits`, `average_bits` and `overrides` are for integers.
      bits: 8, 6, 5, 4, 3 or 2.
      group: neighbouring inputs (of a table: columns) that share one scale; None is the whole row.
      pattern: full-match address pattern; the default takes every kernel and every table that is still dense.
      rounding: "gptq" rounds layer after layer on the inputs that the compressed prefix gives, each column making up
        for the errors before it; "mse" picks scales of least squared error; "nearest" is the plain baseline. Tables,
        and kernels outside the layers, have no error to pass on: "gptq" means "mse" for them.
      average_bits: spend this many bits per value, scales not counted, on the kernels in layers: each gets one of
        `choices` by what its rounding alone costs the sentence vectors (see `sensitivity`); `bits` is for the rest.
      overrides: other bits for some of the matrices, the first match winning; all are rounded in one sequence.
      scale_dtype: how scales are stored.
      sentences: calibration sentences for "gptq".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"tokens", "input_moments"})

    numbers: Literal["int", "nf4", "fp8"] = "int"
    bits: int = 8
    group: int | None = None
    pattern: str = r".*/kernel|embedding/(token|position|segment)"
    rounding: Rounding = "gptq"
    average_bits: float | None = None
    choices: tuple[int, ...] = (2, 3, 4)
    overrides: tuple[BitsFor, ...] = ()
    scale_dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    sentences: int = 768

    def spec_for(self, address: str) -> ScaledSpec:
        """The format that the matrix at `address` gets."""
        if self.numbers != "int":
            return _CODED[self.numbers](group=self.group, scale_dtype=self.scale_dtype)
        for override in self.overrides:
            if re.fullmatch(override.pattern, address):
                return QuantizedSpec(bits=override.bits, group=override.group, scale_dtype=self.scale_dtype)
        return QuantizedSpec(bits=self.bits, group=self.group, scale_dtype=self.scale_dtype)

    def __post_init__(self):
        for bits, group in [(self.bits, self.group), *((o.bits, o.group) for o in self.overrides)]:
            QuantizedSpec(bits=bits, group=group, scale_dtype=self.scale_dtype)  # its own checks
        if self.numbers != "int":
            self.spec_for("")  # its own checks
            if self.average_bits is not None or self.overrides or self.bits != 8:
                raise ValueError(f"Quantize: bits, average_bits and overrides are for integers, not for {self.numbers}")
        if not self.choices:
            raise ValueError("Quantize: choices is empty; give at least one number of bits")
        if self.sentences < 1:
            raise ValueError(f"Quantize: sentences must be at least 1, got {self.sentences}")
        for bits in self.choices:
            QuantizedSpec(bits=bits, group=self.group)
        if self.average_bits is not None and not min(self.choices) <= self.average_bits <= max(self.choices):
            raise ValueError(f"Quantize: average_bits {self.average_bits} lies outside the choices {self.choices}")

    def _addresses(self, flat: Mapping[str, Any]) -> list[str]:
        matrices = [a for a in flat if a.endswith("/kernel") or a in _TABLES]
        chosen = tree.select(matrices, self.pattern, where="Quantize/pattern")
        for override in self.overrides:
            if not override.optional:
                tree.select(chosen, override.pattern, where="Quantize/overrides")
        return chosen

    def _mixed(self, addresses: list[str]) -> list[str]:
        """The kernels whose bits are chosen by `average_bits`."""
        overridden = [o.pattern for o in self.overrides]
        walked = [a for a in addresses if (at := tree.place(a)) and not at.stack and at.part != BASES]
        return [a for a in walked if not any(re.fullmatch(p, a) for p in overridden)]

    def _choice_sizes(self, flat: Mapping[str, Any], addresses: list[str]) -> tuple[dict[str, dict[int, int]], int]:
        """Bytes of every choice, and the bytes that `average_bits` allows in all."""
        assert self.average_bits is not None
        specs = {b: QuantizedSpec(bits=b, group=self.group, scale_dtype=self.scale_dtype) for b in self.choices}
        sizes = {a: {b: spec_bytes(tuple(flat[a].shape), s) for b, s in specs.items()} for a in addresses}
        values = sum(math.prod(flat[a].shape) for a in addresses)
        first = self.choices[0]
        scales = sum(sizes[a][first] - math.prod(flat[a].shape) * first // 8 for a in addresses)
        return sizes, int(values * self.average_bits / 8) + scales

    def _with_bits(self, bits: dict[str, int]) -> Quantize:
        """This step with the chosen bits as exact overrides."""
        exact = tuple(BitsFor(pattern=re.escape(a), bits=b, group=self.group) for a, b in bits.items())
        return dataclasses.replace(self, average_bits=None, overrides=(*exact, *self.overrides))

    def plan(self, config: ModelConfig) -> ModelConfig:
        flat = abstract_flat(config)
        if self.average_bits is not None:
            # Which kernels get more is known only from data; the plan is a choice that is at least as large as any.
            mixed = self._mixed(self._addresses(flat))
            sizes, budget = self._choice_sizes(flat, mixed)
            return self._with_bits(spend(sizes, budget)).plan(config)
        chosen = self._addresses(flat)
        old = {address: spec_of(flat[address]).to_json() for address in chosen}
        planned = {a: _planned(flat[a], self.spec_for(a), table=a in _TABLES) for a in chosen}
        new = {address: spec_of(node).to_json() for address, node in planned.items()}
        if new == old:
            raise ValueError(
                f"Quantize: nothing that pattern {self.pattern!r} matches is left to round: {chosen[0]} is stored as "
                f"{old[chosen[0]]['kind']} already; start from the original model, or leave the step out"
            )
        for address in chosen:
            config = config.with_format(address, new[address])
        return config

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        flat = tree.View(model.params)
        chosen = self._addresses(flat)
        if self.average_bits is not None:
            mixed = self._mixed(chosen)
            sizes, budget = self._choice_sizes(flat, mixed)
            specs = {b: QuantizedSpec(bits=b, group=self.group, scale_dtype=self.scale_dtype) for b in self.choices}
            losses = kernel_sensitivities(context.original, context.need(self), specs, mixed, progress=context.progress)
            return self._with_bits(choose(losses, sizes, budget, what="bits"))(model, context, key=key)
        return super().__call__(model, context, key=key)

    def whole(self) -> str:
        return "" if self.average_bits is None else "average_bits measures every kernel on the whole model; set bits"

    def by_layer(self, config: ModelConfig, weights: Mapping[str, Any], context: Context) -> Iterator[Changes]:
        flat = abstract_flat(config)
        chosen = self._addresses(flat)
        in_turn = walked_kernels(config) & set(chosen) if self.rounding == "gptq" else set()
        bases = {basis_address(config, a) for a in in_turn if is_on_basis(flat[a])} & set(chosen)
        alone = dict(unfinished([a for a in chosen if a not in in_turn | bases], context))

        def rounded(group: str) -> dict[str, Any]:
            addresses = alone.pop(group, [])
            return {a: self._alone(weights[a], self.spec_for(a), table=a in _TABLES) for a in addresses}

        for group in [group for group in alone if tree.place(alone[group][0]) is None]:
            yield group, rounded(group)
        if in_turn:
            rounded_bases: dict[str, Any] = {}
            walk, groups = walked(self, config, weights, context, sentences=self.sentences)
            for group, stages in groups:
                changes = rounded(group)
                for stage in stages:
                    for address in (a for a in stage.addresses if a in in_turn):
                        node, spec = weights[address], self.spec_for(address)
                        if not is_on_basis(node):
                            changes[address] = self._with_moments(node, spec, stage.moments)
                            walk.exchanged[address] = changes[address]
                            continue
                        basis = basis_address(config, address)
                        if basis in bases and basis not in rounded_bases:  # at its first use
                            made = self._with_moments(weights[basis], self.spec_for(basis), stage.moments)
                            changes[basis] = rounded_bases[basis] = made
                        left = rounded_bases.get(basis, weights[basis])
                        right = self._with_moments(node.right, spec, _behind(left, stage.moments))
                        changes[address] = node.replace(right=right)
                        walk.exchanged[address] = LowRank(left=left, right=right)
                yield group, changes
                del changes  # not held while the walk goes on
        for group in list(alone):
            yield group, rounded(group)

    def _alone(self, node: Any, spec: ScaledSpec, *, table: bool) -> Any:
        """Quantizes the dense parts of one matrix by themselves; what is quantized already stays."""
        kind: Rounding = "nearest" if self.rounding == "nearest" else "mse"

        def change(part: Any, is_table: bool) -> Any:
            return part if isinstance(part, Format) else compress_matrix(part, spec, table=is_table, rounding=kind)

        return map_parts(node, change, table=table)

    def _with_moments(self, node: Any, spec: ScaledSpec, moments: Any) -> Any:
        """Quantizes one kernel by GPTQ; of a low-rank one the factors in turn."""
        if isinstance(node, LowRank):
            left = self._with_moments(node.left, spec, moments)
            return LowRank(left=left, right=self._with_moments(node.right, spec, _behind(left, moments)))
        if isinstance(node, Format):  # what it is made of does not read the input
            return self._alone(node, spec, table=False)
        return compress_matrix(node, spec, table=False, rounding="gptq", moments=moments)


def _behind(left: Any, moments: Any) -> Any:
    """The second moment of what the right factor reads, x·left."""
    inner = materialize(left)
    return inner.T @ jnp.asarray(moments) @ inner


def _planned(node: Any, spec: ScaledSpec, *, table: bool) -> Any:
    """The abstract node of a matrix whose dense parts are quantized."""

    def change(part: Any, is_table: bool) -> Any:
        return part if isinstance(part, Format) else _abstract(spec, tuple(part.shape), is_table)

    return map_parts(node, change, table=table)


@functools.cache
def _abstract(spec: ScaledSpec, shape: tuple[int, int], table: bool) -> Any:
    zeros = jax.nn.initializers.zeros
    return jax.eval_shape(lambda key: spec.init(key, shape, zeros, table=table), jax.random.key(0))
