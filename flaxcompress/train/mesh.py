"""The mesh of devices: which axes there are, and how they are laid over the hardware."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from flaxcompress.config import closest

# From the slowest network to the fastest: neighbours in the last axis are neighbours in hardware.
AXES = ("dcn", "data", "fsdp", "sequence", "model")


def parse_mesh(text: str) -> dict[str, int]:
    """ "data=8,model=2" -> {"data": 8, "model": 2}. Raises ValueError for what is no such list."""
    found: dict[str, int] = {}
    for entry in text.split(","):
        name, _, size = (part.strip() for part in entry.partition("="))
        if name not in AXES:
            raise ValueError(f"mesh: unknown axis {name!r} in {text!r}; {closest(name, AXES)}")
        if name in found:
            raise ValueError(f"mesh: axis {name!r} is there twice in {text!r}")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh: {entry.strip()!r} in {text!r}: write an axis and its size, such as data=8,model=2")
        found[name] = int(size)
    return found


def describe(sizes: Mapping[str, int]) -> str:
    """The inverse of `parse_mesh`, without axes of size 1."""
    return ",".join(f"{name}={sizes[name]}" for name in AXES if sizes.get(name, 1) > 1) or "data=1"


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    model: int = 1,
    sequence: int = 1,
    dcn: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over all devices, or over `devices`.

    Args:
      data: copies of the model, each with its share of every batch.
      fsdp: the same, but each weight is cut among them and put together where it is used (ZeRO-3).
      model: heads and feed-forward widths are cut (tensor parallelism).
      sequence: activations are cut along the sequence; attention gathers keys and values.
      dcn: as `data`, across slices that a slower network joins.

    Raises ValueError where the sizes' product is not the number of devices, with sizes that would do.
    """
    sizes = {"dcn": dcn, "data": data, "fsdp": fsdp, "sequence": sequence, "model": model}
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"mesh: {name} must be a positive integer, got {size!r}")
    found = list(jax.devices() if devices is None else devices)
    if math.prod(sizes.values()) != len(found):
        raise ValueError(_mismatch(sizes, len(found)))
    shape = tuple(sizes[name] for name in AXES)
    slices = {getattr(device, "slice_index", 0) for device in found}
    if dcn > 1 and len(slices) > 1:
        if len(slices) != dcn:
            raise ValueError(f"mesh: dcn={dcn}, but the devices are in {len(slices)} slices; use dcn={len(slices)}")
        across = (dcn, 1, 1, 1, 1)
        laid = mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), across, found, allow_split_physical_axes=True)
    else:
        laid = mesh_utils.create_device_mesh(shape, found, allow_split_physical_axes=True)
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _mismatch(sizes: Mapping[str, int], count: int) -> str:
    said = f"mesh: {describe(sizes)} wants {math.prod(sizes.values())} devices, but there are {count}"
    rest = math.prod(size for name, size in sizes.items() if name != "data")
    if count % rest == 0:
        return f"{said}; {describe({**sizes, 'data': count // rest})} would use them all"
    return f"{said}; the axes other than data need {rest}, which does not divide {count}: use divisors of it"
