"""What a compiled program does, read from its HLO text: products, memory traffic and collectives, loops counted out.

XLA's own cost analysis counts the body of a loop once, whatever its number of turns. Shapes are those of one device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0}
_FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional", "after-all"),
    *("opt-barrier", "optimization-barrier", "partition-id", "replica-id", "iota", "async-start", "async-done"),
    *("copy-done", "slice-done", "async-update", *(f"{name}-done" for name in COLLECTIVES)),
}
_IN_PLACE = ("dynamic-update-slice", "scatter")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    text: str  # between the brackets

    def calls(self) -> list[str]:
        """The computations that run when this does; not those applied to pairs of numbers, as in a reduction."""
        keys = r"(?:calls|body|condition|true_computation|false_computation)"
        keys = rf"(?:{keys}|to_apply)" if self.opcode == "call" else keys
        found = re.findall(rf"{keys}=%?([\w.\-]+)", self.attributes)
        for group in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", self.attributes):
            found += re.findall(r"%([\w.\-]+)", group)
        return found


Computation = list[Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
    """A kind of collective over some axes of the mesh, in one step.

    Attributes:
      kind: one of `COLLECTIVES`.
      axes: of the mesh; its groups of devices are those that differ in them.
      group: devices in a group.
      looped: whether it runs inside of a loop, over layers or microbatches.
      count: how often it runs.
      bytes: of what is put together or summed, all runs together, on one device.
      largest: bytes of the largest one.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    looped: bool
    count: int
    bytes: int
    largest: int

    @property
    def sent(self) -> float:
        """Bytes that leave each device, by the bandwidth-optimal algorithm (a ring's)."""
        if self.kind == "collective-permute":
            return self.bytes
        return self.bytes * (self.group - 1) / self.group * (2 if self.kind == "all-reduce" else 1)


def shape_bytes(shape: str, *, hbm_only: bool = False) -> int:
    """Bytes of a shape, of a tuple's parts together; without those that stay on the chip ("S(1)") if asked for."""
    total = 0
    for kind, dims, layout in re.findall(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]((?:\{[^}]*\})?)", shape):
        if not (hbm_only and re.search(r"S\([1-9]\d*\)", layout)):
            total += math.prod(_dims(dims)) * _bits(kind)
    return -(-total // 8)


def _bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    found = re.search(r"\d+", kind)
    return int(found[0]) if found else 32


def _dims(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _shape_dims(shape: str) -> list[int]:
    """Of an array, or of a tuple's first part."""
    found = re.search(r"\[([\d,<=]*)\]", shape)
    return _dims(found[1]) if found else []


def result_shapes(each: Instruction) -> list[tuple[int, ...]]:
    """The dimensions of what an instruction makes; of a collective that is started apart from its end, the results."""
    found = [tuple(_dims(dims)) for dims in re.findall(r"\b[a-z]+\d*\w*\[([\d,<=]*)\]", each.shape)]
    return found[len(each.operands) :] if each.opcode.endswith("-start") else found


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """HLO text -> ({computation: its instructions}, the entry's name)."""
    found: dict[str, Computation] = {}
    entry, here = "", None
    for line in text.splitlines():
        if line.endswith("{") and "->" in line and not line.startswith(" "):
            head = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
            assert head is not None
            here = found[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            here = None
        elif here is not None and (instruction := _instruction(line)) is not None:
            here.append(instruction)
    return found, entry


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = start + _closing(rest[start:])
    inside = rest[start + 1 : end]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(head[2], shape, rest[:start], operands, rest[end + 1 :], head[1] is not None, inside)


def _closing(text: str) -> int:
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i
    raise ValueError(f"HLO: no closing bracket in {text[:80]!r}")


class Listing:
    """A compiled program of one device, with how often each of its computations runs."""

    def __init__(self, text: str):
        self.computations, entry = parse(text)
        self.turns: Counter[str] = Counter()
        self._fused: set[str] = set()
        self._visit(entry, 1)

    def _visit(self, name: str, times: int) -> None:
        self.turns[name] += times
        for each in self.computations.get(name, ()):
            if each.opcode == "fusion":
                self._fused.update(each.calls())
            inner = times * (self._trips(each) if each.opcode == "while" else 1)
            for called in each.calls():
                self._visit(called, inner)

    def _trips(self, loop: Instruction) -> int:
        """How often a loop turns: as the compiler says, or the number that its counter is compared with."""
        known = re.search(r'known_trip_count"?[=:]\{"?n"?[=:]"?(\d+)', loop.attributes)
        if known is not None:
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
        numbers = [int(n) for n in self._constants(condition[1])] if condition else []
        return max(numbers, default=1)

    def _constants(self, name: str) -> Iterator[str]:
        for each in self.computations.get(name, ()):
            if each.opcode == "constant" and re.match(r"[su]32\[\]", each.shape) and each.text.isdecimal():
                yield each.text
            for called in each.calls():
                yield from self._constants(called)

    def _every(self) -> Iterator[tuple[Instruction, dict[str, Instruction], int, str]]:
        """(instruction, what stands beside it by name, how often it runs, where)."""
        for name, turns in self.turns.items():
            inside = {each.name: each for each in self.computations.get(name, ())}
            for each in inside.values():
                yield each, inside, turns, name

    def flops(self) -> float:
        """Operations of matrix products; a multiply-add is two."""
        return sum(turns * _product_flops(each, inside) for each, inside, turns, _ in self._every())

    def traffic(self) -> float:
        """Bytes read from and written to memory: what instructions outside of fusions read and write."""
        return sum(
            turns * self._touched(each, inside)
            for each, inside, turns, where in self._every()
            if where not in self._fused and each.opcode not in _FREE
        )

    def _touched(self, each: Instruction, inside: Mapping[str, Instruction]) -> float:
        shapes = [inside[name].shape if name in inside else "" for name in each.operands]
        size = functools.partial(shape_bytes, hbm_only=True)
        if each.opcode == "fusion":
            (body,) = each.calls()
            read = sum(min(size(shape), self._read(body, number)) for number, shape in enumerate(shapes))
            return read + min(size(each.shape), self._written(body))
        if each.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * size(each.shape)
        if each.opcode in _IN_PLACE:
            return 2 * sum(map(size, shapes[1:]))
        return sum(map(size, shapes)) + size(each.shape)

    @functools.cache  # noqa: B019  (a program is short-lived)
    def _read(self, body: str, number: int) -> float:
        """Bytes that a fusion reads of its parameter."""
        inside = self.computations[body]
        names = {each.name for each in inside if each.opcode == "parameter" and each.text == str(number)}
        total = 0.0
        for each in inside:
            for place, operand in enumerate(each.operands):
                if operand in names:
                    if each.opcode in ("bitcast", "copy", "reshape"):
                        names.add(each.name)
                    elif each.opcode == "fusion":
                        total += self._read(each.calls()[0], place)
                    elif each.opcode in ("dynamic-slice", "gather", "slice") and place == 0:
                        total += shape_bytes(each.shape)
                    elif each.opcode != "tuple" and not (each.opcode in _IN_PLACE and place == 0):
                        return math.inf
        return total

    @functools.cache  # noqa: B019
    def _written(self, body: str) -> float:
        """Bytes that a fusion writes."""
        inside = {each.name: each for each in self.computations[body]}
        (root,) = (each for each in inside.values() if each.is_root)

        def written(each: Instruction) -> float:
            if each.opcode == "parameter":
                return 0  # handed on
            if each.opcode in ("bitcast", "copy") and each.operands[0] in inside:
                return written(inside[each.operands[0]])
            if each.opcode == "tuple":
                return sum(written(inside[name]) for name in each.operands)
            if each.opcode == "fusion":
                return min(shape_bytes(each.shape), self._written(each.calls()[0]))
            if each.opcode in _IN_PLACE:
                return shape_bytes(inside[each.operands[-1 if each.opcode == "scatter" else 1]].shape)
            return shape_bytes(each.shape)

        return written(root)

    def each_collective(self) -> Iterator[tuple[Instruction, str, int, int, str]]:
        """(instruction, kind, bytes, how often it runs, in which computation) of every collective."""
        parts: set[tuple[str, str]] = set()  # one that runs beside products is written once for each of them
        for each, inside, turns, where in self._every():
            kind = each.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", each.attributes)
                if channel is not None and where in self._fused and kind != "collective-permute":
                    if (kind, channel[1]) in parts:
                        continue
                    parts.add((kind, channel[1]))
                kind = "reduce-scatter" if where.startswith("all-reduce-scatter") else kind  # so TPUs have it
                operands = sum(shape_bytes(inside[name].shape) for name in each.operands if name in inside)
                whole = {
                    "all-gather": self._gathered(each, operands),
                    "all-reduce": min(operands, shape_bytes(each.shape)),
                }
                yield each, kind, whole.get(kind, operands), turns, where

    @staticmethod
    def _gathered(each: Instruction, operands: int) -> int:
        """Bytes of an all-gather's result; started apart from its end, its shape is (operands, results)."""
        return shape_bytes(each.shape) - (operands if each.opcode.endswith("-start") else 0)

    def collectives(self, axes: Mapping[str, int]) -> list[Collective]:
        """All collectives by kind and mesh axes, the most bytes first.

        Args:
          axes: the mesh's, with their sizes, in the order in which devices are numbered.
        """
        found: dict[tuple[str, tuple[str, ...], int, bool], list[int]] = {}
        for each, kind, size, turns, _ in self.each_collective():
            over, group = spanned(each.attributes, axes, pairs=kind == "collective-permute")
            if group > 1:
                found.setdefault((kind, over, group, turns > 1), []).extend([size] * turns)
        made = [Collective(*key, len(sizes), sum(sizes), max(sizes)) for key, sizes in found.items()]
        return sorted(made, key=lambda c: -c.sent)


def spanned(attributes: str, axes: Mapping[str, int], *, pairs: bool = False) -> tuple[tuple[str, ...], int]:
    """(the mesh axes in which the devices of a collective's groups differ, devices in a group)."""
    shape = tuple(axes.values())
    groups = _groups(attributes, math.prod(shape), pairs)
    places = np.stack(np.unravel_index(groups, shape), -1)  # [groups, devices, axes]
    differ = (places != places[:, :1]).any((0, 1))
    return tuple(name for name, on in zip(axes, differ, strict=True) if on), groups.shape[1]


def _groups(attributes: str, devices: int, pairs: bool) -> np.ndarray:
    """[groups, devices in each] of a collective, from any of the ways in which HLO writes them."""
    if pairs:
        found = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
        assert found is not None
        return np.asarray(_dims(found[1])).reshape(-1, 2)
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        ids = np.arange(devices).reshape(_dims(found[2]))
        return (ids.transpose(_dims(found[3])) if found[3] else ids).reshape(_dims(found[1]))
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        over = re.findall(r"'([^']+)'", found[2])
        order = [*(i for i, name in enumerate(sizes) if name not in over), *(list(sizes).index(n) for n in over)]
        ids = np.arange(devices).reshape(tuple(sizes.values())).transpose(order)
        return ids.reshape(-1, math.prod(sizes[name] for name in over))
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return np.asarray([_dims(group) for group in re.findall(r"\{(.*?)\}", found[1])])
    return np.arange(devices)[None]


def _product_flops(each: Instruction, inside: Mapping[str, Instruction]) -> float:
    if each.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (_shape_dims(inside[name].shape) for name in each.operands[:2])
    out = _shape_dims(each.shape)
    if each.opcode == "dot":
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.attributes)
        return 2.0 * math.prod(out) * math.prod(left[i] for i in _dims(found[1] if found else ""))
    return _convolution_flops(each.attributes, left, right, out)


def _convolution_flops(attributes: str, left: list[int], right: list[int], out: list[int]) -> float:
    """As XLA counts: only pairs of places that lie inside, since batched products are written as dilated windows."""
    labels: Any = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    window = re.search(r"window=\{(.*?)\}", attributes)
    settings = dict(re.findall(r"(\w+)=([\d_x\-]+)", window[1])) if window else {}
    spatial = [c for c in labels[1] if c.isdigit()]

    def per_axis(name: str, default: Any) -> list[Any]:
        text = settings.get(name)
        return [default] * len(spatial) if text is None else text.split("x")

    valid = 1.0
    for number, label in enumerate(spatial):
        base, kernel = left[labels[1].index(label)], right[labels[2].index(label)]
        steps, results = int(per_axis("stride", 1)[number]), out[labels[3].index(label)]
        low = int(str(per_axis("pad", "0_0")[number]).split("_")[0])
        apart, spread = int(per_axis("lhs_dilate", 1)[number]), int(per_axis("rhs_dilate", 1)[number])
        place = np.arange(results)[:, None] * steps + np.arange(kernel)[None] * spread - low
        valid *= float(((place >= 0) & (place % apart == 0) & (place // apart < base)).sum())
    inputs, outputs = right[labels[2].index("i")], right[labels[2].index("o")]
    batch = out[labels[3].index("b")]
    return 2.0 * valid * inputs * outputs * batch
