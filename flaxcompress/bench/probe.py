"""Cold start and memory of one contestant: the script of its process, `python -P probe.py '{…}'`.

Importing any file of the package first runs flaxcompress/__init__.py, which imports JAX, and PyTorch's process must not
pay for that: it gets the packages it needs without their __init__. So nothing of ours is imported at the top here, and
what `Torch` and `make_batch` import must stay light.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np  # noqa: F401  # every contestant's, so it counts for none


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """{import_seconds, load_seconds, first_call_seconds, peak_bytes} of {runtime, folder, shapes}."""
    start = time.perf_counter()
    if request["runtime"] == "flaxcompress":
        import flaxcompress.folder  # noqa: F401

        imported = time.perf_counter()
        from flaxcompress.bench.ours import Flax as Runner
    else:
        import torch
        import transformers

        _ = transformers.AutoModel  # transformers imports its parts when they are asked for
        imported = time.perf_counter()
        _without_init("flaxcompress", "flaxcompress.bench", "flaxcompress.export")
        from flaxcompress.bench.pytorch import Torch as Runner
        from flaxcompress.machine import cores

        torch.set_num_threads(cores())
    from flaxcompress.bench.batch import make_batch

    ready = time.perf_counter()
    runner = Runner(Path(request["folder"]))
    loaded = time.perf_counter()
    runner(runner.prepare(*make_batch(**request["shapes"])))
    return {
        "import_seconds": imported - start,
        "load_seconds": loaded - ready,
        "first_call_seconds": time.perf_counter() - loaded,
        "peak_bytes": _peak_bytes(),
    }


def _without_init(*packages: str) -> None:
    """Lets files of packages be imported without running the packages' __init__."""
    for name in packages:
        spec = util.find_spec(name)
        assert spec is not None
        sys.modules[name] = util.module_from_spec(spec)


def _peak_bytes() -> int:
    """The most resident memory this process has had."""
    with contextlib.suppress(OSError):
        # Not ru_maxrss first: on Linux it survives exec, so a child starts with its parent's peak.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(json.dumps(probe(json.loads(sys.argv[1]))))
