"""Cold start and memory of one contestant, taken in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_PROBE = Path(__file__).absolute().with_name("probe.py")
_PROBE_SECONDS = 600


def in_process_of_its_own(runtime: str, folder: Path, shapes: dict[str, int]) -> dict[str, Any]:
    """{import_seconds, load_seconds, first_call_seconds, peak_bytes} of one contestant."""
    request = json.dumps({"runtime": runtime, "folder": str(folder.absolute()), "shapes": shapes})
    root = str(_PROBE.parents[2])
    paths = [path for path in (os.environ.get("PYTHONPATH"), root) if path]
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(_PROBE), request],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{folder}: {runtime} did not load and run within {_PROBE_SECONDS} s") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(f"{folder}: {runtime} failed in a process of its own: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])
