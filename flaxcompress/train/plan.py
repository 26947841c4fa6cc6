"""What a training step needs on chips that are not here: compiled ahead of time, and read from the compiled program."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from flaxcompress import tree
from flaxcompress.config import ModelConfig
from flaxcompress.nn.logical import BATCH
from flaxcompress.train.abstract import abstract_params, count, shard_bytes
from flaxcompress.train.chips import CHIPS, RESERVED, SOURCE, devices_of, parse_topology
from flaxcompress.train.config import TrainConfig
from flaxcompress.train.hlo import Collective, Listing
from flaxcompress.train.memory import REMAT_ORDER, program_bytes
from flaxcompress.train.mesh import describe, make_mesh, parse_mesh
from flaxcompress.train.objectives import Program
from flaxcompress.train.placement import OnMesh
from flaxcompress.train.plan_settings import planned_structure
from flaxcompress.train.sharding import check_widths
from flaxcompress.train.step import Recipe
from flaxcompress.train.structure import check_length

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_CANDIDATES = 8  # that are compiled in search of one that fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """One way of running the step: the mesh's axes, what is computed again, and in how many microbatches."""

    mesh: Mapping[str, int]
    remat: str
    accumulate: int = 1

    def __str__(self) -> str:
        more = f" training.accumulate={self.accumulate}" if self.accumulate > 1 else ""
        return f"--mesh {describe(self.mesh)} training.remat={self.remat}{more}"


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
    accumulate: int
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
        out["better"] = None if self.better is None else dataclasses.asdict(self.better)
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
        parts = f", {self.accumulate} microbatches" if self.accumulate > 1 else ""
        yield "parameters", stated(self.parameter_bytes), f"{self.parameters:,} in all"
        yield "optimizer", stated(self.optimizer_bytes), ""
        yield "batch", stated(self.batch_bytes), ""
        yield "activations", stated(self.temporary_bytes), f"and gradients; remat {self.remat}{parts}, {self.dtype}"
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
    settings: TrainConfig,
    *,
    topology: str,
    mesh: Mapping[str, int] | None = None,
    suggest: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Compiles the step of a training run for a topology and reads from the program what it needs there; runs nothing.

    Args:
      settings: of the run; its data are not read, but for the classes of a classifier whose settings leave them open.
      topology: "v5e:16x16", which takes libtpu but no TPU, or "cpu:8".
      mesh: {axis: size}, see `make_mesh`; None: the settings'.
      suggest: where it does not fit, compiles up to eight other meshes, kinds of remat and microbatches, the nearest
        first, for one that does.
      report: called with a line before each of these.

    Raises:
      ValueError: an unknown topology, or one that cannot be compiled for here; a mesh that does not match it, or cuts
        what it does not divide; settings that do not go together.
    """
    if mesh is None and settings.mesh is None:
        raise ValueError("mesh: neither the settings nor the command names the axes of the mesh")
    training = settings.training
    sizes = parse_mesh(settings.mesh or "") if mesh is None else dict(mesh)
    config = planned_structure(settings)
    check_length(settings, config)
    make = functools.partial(_plan, settings, config, topology, devices_of(topology))
    first = make(Way(mesh=sizes, remat=training.remat, accumulate=training.accumulate))
    if first.fits or not suggest:
        return first
    assert first.capacity is not None
    for way in _others(config, first):
        report(f"{first.peak_bytes / 1e9:.1f} GB of {first.capacity / 1e9:.1f}: trying {way}")
        if make(way).fits:
            return dataclasses.replace(first, better=way)
    return first


def _others(config: ModelConfig, first: Plan) -> Iterator[Way]:
    """Other ways, those that change least first: more is computed again; microbatches; weights are cut; heads are."""
    sizes = {"dcn": 1, "data": 1, "fsdp": 1, "sequence": 1, "model": 1, **first.mesh}
    parts, own = first.accumulate, first.remat
    ways = [(sizes, remat, parts) for remat in REMAT_ORDER[REMAT_ORDER.index(own) + 1 :]]
    ways += [(sizes, "full", parts * more) for more in (2, 4)]
    cut = {**sizes, "data": 1, "fsdp": sizes["data"] * sizes["fsdp"]}
    if cut != sizes:
        ways += [(cut, own, parts), (cut, "full", parts), (cut, "full", parts * 4)]
    while cut["fsdp"] % 2 == 0:
        cut = {**cut, "fsdp": cut["fsdp"] // 2, "model": cut["model"] * 2}
        ways.append((cut, "full", parts))
    tried = {str(Way(mesh=sizes, remat=own, accumulate=parts))}
    for mesh, remat, accumulate in ways:
        way = Way(mesh=mesh, remat=remat, accumulate=accumulate)
        if str(way) not in tried and _could_fit(config, way, first) and len(tried) <= _CANDIDATES:
            tried.add(str(way))
            yield way


def _could_fit(config: ModelConfig, way: Way, first: Plan) -> bool:
    """Whether the mesh cuts the model and the batch at all, and weights and optimizer alone leave room."""
    mesh = AbstractMesh(tuple(way.mesh.values()), tuple(way.mesh))
    try:
        check_widths(config, mesh)  # pyright: ignore[reportArgumentType]
    except ValueError:
        return False
    cuts = way.mesh["fsdp"] * way.mesh["model"]
    before = first.mesh.get("fsdp", 1) * first.mesh.get("model", 1)
    least = (first.parameter_bytes + first.optimizer_bytes) * before / cuts
    rows = math.prod(way.mesh[axis] for axis in BATCH) * way.accumulate
    return first.capacity is not None and least < first.capacity and first.batch_size % rows == 0


def _plan(settings: TrainConfig, config: ModelConfig, topology: str, devices: list[Any], way: Way) -> Plan:
    training = settings.training
    split, constants = settings.task.objective(training.z_loss).split()
    dtype = training.dtype or ("float32" if topology.startswith("cpu") else "bfloat16")
    optimizer = settings.optimizer.build(training.steps)
    program = Program(split, config, jnp.dtype(dtype), way.remat, training.unroll)
    recipe = Recipe(program, optimizer, way.accumulate, training.ema, training.spike)
    params = abstract_params(config, settings.trainable)
    place = OnMesh(make_mesh(**way.mesh, devices=devices), config)
    batch = settings.task.shapes(training.batch_size, training.length, config)
    given = place.abstract(recipe, params, tree.abstract(constants), batch, settings.trainable)
    state, frozen, constants, batch = given
    sizes = [shard_bytes(each) for each in ((state.trainable, frozen), (state.optimizer, state.average), batch)]
    chip = CHIPS.get(parse_topology(topology)[0])
    known: dict[str, Any] = {"topology": topology, "chips": len(devices), **dataclasses.asdict(way), "dtype": dtype}
    known |= {"batch_size": training.batch_size, "length": training.length, "parameters": count(params)}
    known |= dict(zip(("parameter_bytes", "optimizer_bytes", "batch_bytes"), sizes, strict=True))
    start = time.perf_counter()
    try:
        with place.context():
            key = jax.eval_shape(lambda: jax.random.key(0))
            compiled = place.lower(recipe, *given, key).compile()
    except jax.errors.JaxRuntimeError as error:
        used, capacity = _overflow(error, sum(sizes))
        nothing = {"temporary_bytes": None, "collectives": (), "flops": 0.0, "traffic": 0.0, "compute_seconds": None}
        known |= {**nothing, "memory_seconds": None, "link_seconds": None}
        return Plan(**known, peak_bytes=used, capacity=capacity, compile_seconds=time.perf_counter() - start)
    seconds, needed = time.perf_counter() - start, program_bytes(compiled)
    assert needed is not None  # these compilers tell
    listing = compiled.as_text()
    read = Listing(listing)
    collectives = tuple(read.collectives(dict(place.mesh.shape)))
    flops, traffic = read.flops(), read.traffic()
    return Plan(
        **known,
        temporary_bytes=needed[1],
        peak_bytes=sum(needed),
        capacity=None if chip is None else chip.memory - RESERVED,
        collectives=collectives,
        flops=flops,
        traffic=traffic,
        compute_seconds=None if chip is None else flops / chip.flops,
        memory_seconds=None if chip is None else traffic / chip.memory_rate,
        link_seconds=None if chip is None else sum(each.sent for each in collectives) / chip.link_rate,
        compile_seconds=seconds,
        program=listing,
    )


def sized(size: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, power in (("GB", 1e9), ("MB", 1e6)):
        if size >= power:
            return f"{size / power:,.2f} {unit}"
    return f"{size / 1e3:,.1f} kB"


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
