"""What this process may use of the machine; imports nothing, so that any process can ask."""

from __future__ import annotations

import os


def cores() -> int:
    """How many cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
