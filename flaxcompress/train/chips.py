"""Accelerators that a training step can be compiled for without having one."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax

from flaxcompress.config import closest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip as its maker describes it.

    Attributes:
      flops: dense bfloat16 operations per second.
      memory: bytes of HBM.
      memory_rate: bytes per second from and to HBM.
      link_rate: bytes per second out of a chip, all links between chips together.
      environment: what libtpu has to be told to compile for it elsewhere.
    """

    flops: float
    memory: int
    memory_rate: float
    link_rate: float
    environment: str


# Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" (cloud.google.com/tpu/docs), the specifications of a
# chip: peak bf16 TFLOPS, HBM capacity and bandwidth, and inter-chip interconnect bandwidth in Gbps.
SOURCE = "Google Cloud, TPU system architecture"
RESERVED = 2**28  # bytes of HBM that libtpu keeps for itself, as it says of v5e (15.75 of 16 GiB are left)
CHIPS: dict[str, Chip] = {
    "v4": Chip(flops=275e12, memory=32 * 2**30, memory_rate=1228e9, link_rate=2400e9 / 8, environment="v4-8"),
    "v5e": Chip(flops=197e12, memory=16 * 2**30, memory_rate=819e9, link_rate=1600e9 / 8, environment="v5litepod-4"),
    "v5p": Chip(flops=459e12, memory=95 * 2**30, memory_rate=2765e9, link_rate=4800e9 / 8, environment="v5p-8"),
    "v6e": Chip(flops=918e12, memory=32 * 2**30, memory_rate=1640e9, link_rate=3584e9 / 8, environment="v6e-4"),
}


def parse_topology(text: str) -> tuple[str, tuple[int, ...]]:
    """ "v5e:16x16" -> ("v5e", (16, 16)), "cpu:8" -> ("cpu", (8,)). Raises ValueError for what is neither."""
    kind, _, shape = text.partition(":")
    if kind not in (*CHIPS, "cpu"):
        raise ValueError(f"topology: unknown kind {kind!r} in {text!r}; {closest(kind, (*CHIPS, 'cpu'))}")
    wanted = {"cpu": r"\d+", "v5e": r"\d+x\d+", "v6e": r"\d+x\d+"}.get(kind, r"\d+x\d+x\d+")
    sizes = tuple(int(size) for size in re.findall(r"\d+", shape))
    if not re.fullmatch(wanted, shape) or not all(sizes):
        example = {"cpu": "cpu:8", "v5e": "v5e:16x16", "v6e": "v6e:16x16"}.get(kind, f"{kind}:4x4x4")
        raise ValueError(f"topology: {text!r} has no shape of chips that {kind} comes in; write for example {example}")
    return kind, sizes


def pretend_devices(text: str) -> None:
    """Before JAX counts its devices: nothing is to run, and the CPU pretends to be as many as "cpu:N" has."""
    kind, sizes = parse_topology(text)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # which programs for absent devices cannot be read from
    if kind == "cpu":
        jax.config.update("jax_num_cpu_devices", sizes[0])


def devices_of(text: str) -> list[Any]:
    """The devices of a topology, which compile and do not run unless they are here.

    Raises ValueError for an unknown topology, without libtpu, and for more CPU devices than JAX was started with.
    """
    kind, sizes = parse_topology(text)
    if kind == "cpu":
        found = jax.devices("cpu")
        if len(found) < sizes[0]:
            raise ValueError(
                f"topology: {text!r}, but JAX was started with {len(found)} CPU devices; set "
                f"jax.config.update('jax_num_cpu_devices', {sizes[0]}) before its first use"
            )
        return found[: sizes[0]]
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f'topology: {text!r} needs the TPU compiler: pip install "jax[tpu]=={jax.__version__}" (no TPU is needed)'
        )
    from jax.experimental import topologies

    # Libtpu would ask the cloud which machine this is, and JAX leaves its complaint in these variables.
    settings = {"TPU_ACCELERATOR_TYPE": CHIPS[kind].environment, "TPU_WORKER_ID": "0"}
    settings |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    settings |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # nothing runs, so that several plans do not disturb each other
    for name, value in settings.items():
        if "WARNING" in os.environ.get(name, "WARNING"):
            os.environ[name] = value
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=text).devices)
    except Exception as error:  # libtpu's errors have no type of their own
        raise ValueError(f"topology: libtpu refuses {text!r}: {str(error).splitlines()[0]}") from None
