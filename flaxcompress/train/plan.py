"""What a training step needs on chips that are not here: compiled ahead of time, and read from the compiled program."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from flaxcompress import tree
from flaxcompress.config import ModelConfig
from flaxcompress.formats import RowFormat, map_parts, thaw
from flaxcompress.model import abstract_flat
from flaxcompress.nn.remat import REMAT, check_remat
from flaxcompress.train.chips import CHIPS, RESERVED, SOURCE, devices_of, parse_topology
from flaxcompress.train.hlo import Collective, Program
from flaxcompress.train.mesh import describe, make_mesh
from flaxcompress.train.planned_step import Step, abstract_batch, training_step
from flaxcompress.train.sharding import batch_shardings, check_widths, param_shardings, state_shardings, within
from flaxcompress.train.trainable import partition

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_CANDIDATES = 6  # that are compiled in search of one that fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """One way of running the step: the mesh's axes, and what is computed again."""

    mesh: Mapping[str, int]
    remat: str

    def __str__(self) -> str:
        return f"--mesh {describe(self.mesh)}, remat {self.remat}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One training step on one of the chips; bytes, operations and seconds are a chip's.

    Attributes:
      parameters: of the whole model, as they are trained.
      parameter_bytes, optimizer_bytes, batch_bytes: what the step is given.
      temporary_bytes: activations, gradients and whatever else the program holds at its fullest; None where the
        compiler gave up before it knew.
      peak_bytes: all of these together.
      capacity: what a program may use of a chip's memory; None for a CPU.
      flops: of matrix products, with what is computed again.
      traffic: bytes from and to memory.
      compute_seconds, memory_seconds, link_seconds: of these, and of the collectives, at the chip's published rates.
      compile_seconds: on this machine.
      better: a way that fits, where this one does not.
      program: the HLO text.
    """

    topology: str
    chips: int
    mesh: Mapping[str, int]
    remat: str
    dtype: str
    batch_size: int
    length: int
    parameters: int
    parameter_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    temporary_bytes: int | None
    peak_bytes: int
    capacity: int | None
    collectives: tuple[Collective, ...]
    flops: float
    traffic: float
    compute_seconds: float | None
    memory_seconds: float | None
    link_seconds: float | None
    compile_seconds: float
    better: Way | None = None
    program: str = dataclasses.field(default="", repr=False)

    @property
    def fits(self) -> bool:
        """Whether a chip has room for it."""
        return self.capacity is None or self.peak_bytes <= self.capacity

    @property
    def step_seconds(self) -> float | None:
        """The roofline: the slowest of compute, memory and links, as if they ran at once without waiting."""
        times = (self.compute_seconds, self.memory_seconds, self.link_seconds)
        return None if None in times or not self.flops else max(times)  # pyright: ignore[reportArgumentType]

    def to_json(self) -> dict[str, Any]:
        """All fields but the program."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "program"}
        out["mesh"] = dict(self.mesh)
        out["collectives"] = [{**dataclasses.asdict(c), "axes": list(c.axes), "sent": c.sent} for c in self.collectives]
        out["better"] = None if self.better is None else {"mesh": dict(self.better.mesh), "remat": self.better.remat}
        rates = None if self.topology.startswith("cpu") else SOURCE
        return {**out, "fits": self.fits, "step_seconds": self.step_seconds, "rates": rates}

    def table(self) -> Any:
        """A rich table."""
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=Text(f"one step of {self.batch_size} × {self.length} on {self.topology}, {describe(self.mesh)}"),
            caption=Text(self._verdict()),
        )
        table.add_column("per chip")
        table.add_column("", justify="right")
        table.add_column("")
        for row in self._rows():
            if row is None:
                table.add_section()
            else:
                table.add_row(*map(Text, row))
        return table

    def _rows(self) -> Iterator[tuple[str, str, str] | None]:
        stated = lambda size: "unknown" if size is None else sized(size)  # noqa: E731
        seconds = lambda time: "–" if time is None else f"{time * 1e3:,.1f} ms"  # noqa: E731
        yield "parameters", stated(self.parameter_bytes), f"{self.parameters:,} in all"
        yield "optimizer", stated(self.optimizer_bytes), ""
        yield "batch", stated(self.batch_bytes), ""
        yield "activations", stated(self.temporary_bytes), f"and gradients; remat {self.remat}, {self.dtype}"
        yield "peak", stated(self.peak_bytes), "" if self.capacity is None else f"of {sized(self.capacity)}"
        if self.temporary_bytes is None:
            return
        yield None
        for each in self.collectives:
            where = ", in loops" if each.looped else ""
            yield f"{each.kind} over {', '.join(each.axes)}", stated(each.bytes), f"{each.count:,} of them{where}"
        yield None
        yield "products", f"{self.flops / 1e12:,.2f} TFLOP", seconds(self.compute_seconds)
        yield "memory traffic", stated(self.traffic), seconds(self.memory_seconds)
        yield "links", stated(sum(each.sent for each in self.collectives)), seconds(self.link_seconds)
        if self.step_seconds:
            rate = f"{self.batch_size * self.length / self.step_seconds:,.0f} tokens/s on all chips"
            yield "step, at the least", seconds(self.step_seconds), rate

    def _verdict(self) -> str:
        compiled = f"compiled in {self.compile_seconds:,.0f} s"
        if self.capacity is None:
            return compiled
        if self.fits:
            return f"it fits; {compiled}"
        more = "nothing near it that was tried fits" if self.better is None else f"this would: {self.better}"
        return f"it does not fit; {more}"


def plan(
    config: ModelConfig,
    *,
    topology: str,
    mesh: Mapping[str, int],
    batch_size: int,
    length: int,
    optimizer: optax.GradientTransformation | None = None,
    remat: str = "none",
    dtype: str = "bfloat16",
    step: Callable[..., Step] = training_step,
    suggest: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Compiles one training step for a topology and reads from the program what it needs there; nothing is run.

    Args:
      topology: "v5e:16x16", which takes libtpu but no TPU, or "cpu:8".
      mesh: {axis: size}, see `make_mesh`.
      batch_size: examples of a step, over all chips.
      length: tokens of an example.
      optimizer: None for AdamW.
      remat: see `nn/remat.py`.
      dtype: of the computation; parameters and optimizer are float32.
      step: (config, optimizer, dtype, remat) -> the step; the objective is in it.
      suggest: where it does not fit, compiles up to six other meshes and kinds of remat, the nearest first, for one
        that does.
      report: called with a line before each of these.

    Raises:
      ValueError: an unknown topology, or one that cannot be compiled for here; a mesh that does not match it, or cuts
        what it does not divide; an unknown remat.
    """
    check_remat(remat)
    optimizer = optax.adamw(1e-4) if optimizer is None else optimizer
    devices = devices_of(topology)
    make = functools.partial(
        _plan, config, topology, devices, batch_size, length, optimizer=optimizer, dtype=dtype, step=step
    )
    first = make(Way(mesh=dict(mesh), remat=remat))
    if first.fits or not suggest:
        return first
    assert first.capacity is not None
    for way in _others(config, first, len(devices)):
        report(f"{first.peak_bytes / 1e9:.1f} GB of {first.capacity / 1e9:.1f}: trying {way}")
        if make(way).fits:
            return dataclasses.replace(first, better=way)
    return first


def _others(config: ModelConfig, first: Plan, chips: int) -> Iterator[Way]:
    """Other ways, those that change least first: more is computed again; weights are cut; heads are cut."""
    sizes = {"dcn": 1, "data": 1, "fsdp": 1, "sequence": 1, "model": 1, **first.mesh}
    stronger = REMAT[REMAT.index(first.remat) + 1 :][::-1]
    order = sorted(stronger, key=("dots", "full").index)
    ways = [Way(mesh=sizes, remat=remat) for remat in order]
    cut = {**sizes, "data": 1, "fsdp": sizes["data"] * sizes["fsdp"]}
    ways += [Way(mesh=cut, remat=remat) for remat in (first.remat, "full") if cut != sizes]
    while cut["fsdp"] % 2 == 0:
        cut = {**cut, "fsdp": cut["fsdp"] // 2, "model": cut["model"] * 2}
        ways.append(Way(mesh=cut, remat="full"))
    tried = {str(Way(mesh=sizes, remat=first.remat))}
    for way in ways:
        if str(way) not in tried and _could_fit(config, way, first, chips) and len(tried) <= _CANDIDATES:
            tried.add(str(way))
            yield way


def _could_fit(config: ModelConfig, way: Way, first: Plan, chips: int) -> bool:
    """Whether the mesh cuts the model at all, and weights and optimizer alone leave room."""
    from jax.sharding import AbstractMesh

    mesh = AbstractMesh(tuple(way.mesh.values()), tuple(way.mesh))
    try:
        check_widths(config, mesh)  # pyright: ignore[reportArgumentType]
    except ValueError:
        return False
    cuts = way.mesh["fsdp"] * way.mesh["model"]
    before = first.mesh.get("fsdp", 1) * first.mesh.get("model", 1)
    least = (first.parameter_bytes + first.optimizer_bytes) * before / cuts
    return (
        first.capacity is not None and least < first.capacity and first.batch_size % (chips // way.mesh["model"]) == 0
    )


def _plan(
    config: ModelConfig,
    topology: str,
    devices: list[Any],
    batch_size: int,
    length: int,
    way: Way,
    *,
    optimizer: optax.GradientTransformation,
    dtype: str,
    step: Callable[..., Step],
) -> Plan:
    mesh = make_mesh(**way.mesh, devices=devices)
    params = abstract_params(config)
    given = _placed(config, params, optimizer, abstract_batch(config, batch_size, length), mesh)
    sizes = [shard_bytes(each) for each in given]
    chip = CHIPS.get(parse_topology(topology)[0])
    known: dict[str, Any] = {"topology": topology, "chips": len(devices), "mesh": dict(way.mesh), "remat": way.remat}
    known |= {"dtype": dtype, "batch_size": batch_size, "length": length, "parameters": count(params)}
    known |= {"parameter_bytes": sizes[0] + sizes[1], "optimizer_bytes": sizes[2], "batch_bytes": sizes[3]}
    start = time.perf_counter()
    try:
        compiled = _compile(step(config, optimizer, jnp.dtype(dtype), way.remat), given, mesh)
    except jax.errors.JaxRuntimeError as error:
        used, capacity = _overflow(error, sum(sizes))
        nothing = {"temporary_bytes": None, "collectives": (), "flops": 0.0, "traffic": 0.0, "compute_seconds": None}
        known |= {**nothing, "memory_seconds": None, "link_seconds": None}
        return Plan(**known, peak_bytes=used, capacity=capacity, compile_seconds=time.perf_counter() - start)
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    program = compiled.as_text()
    read = Program(program)
    collectives = tuple(read.collectives(dict(mesh.shape)))
    flops, traffic = read.flops(), read.traffic()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Plan(
        **known,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=held + memory.temp_size_in_bytes,
        capacity=None if chip is None else chip.memory - RESERVED,
        collectives=collectives,
        flops=flops,
        traffic=traffic,
        compute_seconds=None if chip is None else flops / chip.flops,
        memory_seconds=None if chip is None else traffic / chip.memory_rate,
        link_seconds=None if chip is None else sum(each.sent for each in collectives) / chip.link_rate,
        compile_seconds=seconds,
        program=program,
    )


def abstract_params(config: ModelConfig) -> Any:
    """The parameters as they are trained (see `thaw_model`), abstract."""

    def trained(node: Any, table: bool) -> Any:
        del table
        if isinstance(node, RowFormat):
            return thaw(node)
        floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if floating(leaf) else leaf, node)

    make = lambda node: map_parts(node, trained, table=False)  # noqa: E731
    return tree.unflatten({address: jax.eval_shape(make, node) for address, node in abstract_flat(config).items()})


def _placed(config: ModelConfig, params: Any, optimizer: Any, batch: Any, mesh: Mesh) -> tuple[Any, Any, Any, Any]:
    """(trainable and other parameters, the optimizer's state, the batch), abstract, each leaf with its sharding."""
    with_sharding = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    shardings = param_shardings(params, config, mesh)
    moving, fixed = partition(jax.tree.map(with_sharding, params, shardings))
    state = jax.eval_shape(optimizer.init, moving)
    state = jax.tree.map(with_sharding, state, state_shardings(optimizer, moving, shardings))
    return moving, fixed, state, jax.tree.map(with_sharding, batch, batch_shardings(batch, mesh))


def _compile(step: Step, given: tuple[Any, Any, Any, Any], mesh: Mesh) -> Any:
    shardings = [jax.tree.map(lambda leaf: leaf.sharding, each) for each in (given[0], given[2])]
    with within(mesh):
        jitted = jax.jit(step, donate_argnums=(0, 2), out_shardings=(*shardings, None))
        key = jax.eval_shape(lambda: jax.random.key(0))
        return jitted.lower(*given, key).compile()


def shard_bytes(placed: Any) -> int:
    """Bytes of the arrays on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(placed)
    )


def sized(size: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, power in (("GB", 1e9), ("MB", 1e6)):
        if size >= power:
            return f"{size / power:,.2f} {unit}"
    return f"{size / 1e3:,.1f} kB"


def count(params: Any) -> int:
    """How many numbers a tree holds."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def _overflow(error: Exception, given: int) -> tuple[int, int]:
    """(bytes used, bytes that there are), from the compiler's complaint; anything else is raised again.

    Args:
      given: bytes of the arguments, which it does not count.
    """
    used = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", str(error))
    temporary = re.search(r"temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", str(error))
    if (found := used or temporary) is None:
        raise error
    needed, there = (int(float(found[i]) * _UNITS[found[i + 1]]) for i in (1, 3))
    return needed + given, there
