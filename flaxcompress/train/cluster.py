"""Joining the other processes of a run on a pod, a Slurm job or Kubernetes, without flags."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import util
from pathlib import Path
from typing import Any

import jax
import numpy as np

# A process that says nothing for so long is taken for dead, and the others end. JAX's own 100 seconds leave a pod idle.
HEARTBEAT_SECONDS = 20
_LAST_WORDS = 1.0  # seconds in which the others say what they met, before the first process's end ends them
_GONE = re.compile(
    r"[Gg]loo|NCCL|coordination|heartbeat|[Bb]arrier|UNAVAILABLE|DEADLINE_EXCEEDED|[Cc]onnection (reset|closed)"
)
_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")


def find_cluster(environment: Mapping[str, str], devices: Path = Path("/dev")) -> str | None:
    """What kind of cluster this process is one of several in; None where it is alone.

    The kinds are those that `jax.distributed.initialize` finds its peers in: "tpu" (GKE, or a TPU VM, which may turn
    out to be alone), "slurm", "kubernetes", "openmpi"; and "variables", where JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say it.

    Raises ValueError where some of these variables are missing, or are no numbers.
    """
    if any(name in environment for name in _BY_HAND[1:]):
        if missing := [name for name in _BY_HAND if name not in environment]:
            raise ValueError(f"cluster: {', '.join(missing)} must be set too: {', '.join(_BY_HAND)} go together")
        for name in _BY_HAND[1:]:
            if not environment[name].isdecimal():
                raise ValueError(f"cluster: {name} must be a number, got {environment[name]!r}")
        return "variables"
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:
        several = "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1
        return "tpu" if several else None
    if all(name in environment for name in _SLURM):
        return "slurm" if int(environment.get("SLURM_NTASKS") or 1) > 1 else None
    if int(environment.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return "openmpi"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "kubernetes"
    if "TPU_SKIP_MDS_QUERY" not in environment and _on_tpu_vm(devices):
        return "tpu"
    return None


def _on_tpu_vm(devices: Path) -> bool:
    chips = [*devices.glob("accel*"), *devices.glob("vfio/[0-9]*")]
    return bool(chips) and util.find_spec("libtpu") is not None


def join_cluster() -> str | None:
    """Joins this process with the others of its cluster; the first thing that a run does, before it uses a device.

    Returns `find_cluster`'s kind. Raises ValueError where the cluster is there but the others cannot be found.
    """
    kind = find_cluster(os.environ)
    if kind is None or jax.distributed.is_initialized():
        return kind
    given = {}
    if kind == "variables":
        address, count, number = (os.environ[name] for name in _BY_HAND)
        given = {"coordinator_address": address, "num_processes": int(count), "process_id": int(number)}
    if kind == "kubernetes" and util.find_spec("kubernetes") is None:
        raise ValueError(
            "cluster: the other pods of a job are found through Kubernetes' API: pip install 'jax[k8s]' in the image"
        )
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"cluster: {kind} was found, but joining it failed: {error}") from None
    return kind


def leave_cluster() -> None:
    """Waits for the other processes, and leaves."""
    if jax.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # the others are gone already
            jax.distributed.shutdown()


class PeerLost(RuntimeError):
    """Another process of the run has ended, so that this one cannot go on."""


@contextlib.contextmanager
def noticing_lost_peers() -> Iterator[None]:
    """Raises `PeerLost` for what JAX's collectives say when a process at their other end is gone."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not jax.distributed.is_initialized() or not _GONE.search(str(error)):
            raise
        raise PeerLost(
            f"another process of the run has ended ({str(error).splitlines()[0]}); start all of them again: they go on "
            "from the last checkpoint"
        ) from error


def leave_at_once(status: int) -> None:
    """Ends a process whose run failed. Alone, it only returns; the others of a run would be waited for in vain."""
    if not jax.distributed.is_initialized():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(_LAST_WORDS)
    os._exit(status)  # JAX's own way out waits for all processes, up to five minutes


def same_everywhere(make: Callable[[], Any]) -> Any:
    """What process 0 makes, a JSON value, on every process; its mistakes are raised everywhere."""
    if jax.process_count() == 1:
        return make()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    text = b""
    if jax.process_index() == 0:
        try:
            text = json.dumps({"value": make()}).encode()
        except (ValueError, TypeError, OSError) as error:
            text = json.dumps({"error": str(error)}).encode()
    size = int(broadcast_one_to_all(np.int32(len(text))))
    padded = np.frombuffer(text.ljust(size, b" "), np.uint8)
    found = json.loads(np.asarray(broadcast_one_to_all(padded)).astype(np.uint8).tobytes())
    if "error" in found:
        raise ValueError(found["error"])
    return found["value"]
