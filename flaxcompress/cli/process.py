"""What a command changes in its process: huge pages and, while it runs, signals, logging and warnings."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flaxcompress.cli.command import PROGRAM

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_NOISY = ("jax", "absl", "orbax", "transformers", "sentence_transformers", "huggingface_hub", "matplotlib")


def ask_for_huge_pages() -> None:
    """Starts this process over with huge pages for large allocations, where Linux gives them only to who asks.

    XLA's temporary buffers are mapped anew at every step; in small pages the faults take two fifths of a healing step
    (1.25 s against 0.74 s, measured on two cores). glibc reads the setting only when a process starts.
    """
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    with contextlib.suppress(OSError):
        if "GLIBC_TUNABLES" in os.environ or "[madvise]" not in switch.read_text():
            return
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_freed_memory() -> None:
    """Keeps memory that programs free for their next call, where glibc would hand it back to Linux each time.

    A forward pass of 32×128 tokens maps and faults in 370 MB again on every call otherwise, a fifth of its time.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
        library.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def give_back_memory() -> None:
    """Hands every large array back to Linux when it is freed.

    glibc otherwise keeps arrays of up to 32 MB for itself once the first of them was freed.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM is treated like Ctrl-C."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: leave signals to whoever owns it
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def quiet(debug: bool) -> Iterator[None]:
    """Our own warnings as one line each on stderr; other libraries' chatter only with --debug."""
    if not debug:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's; read when JAX is imported
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    ours, silent, root = logging.getLogger(PROGRAM), logging.NullHandler(), logging.getLogger()
    levels = {} if debug else {name: logging.getLogger(name).level for name in _NOISY}
    propagate, ours.propagate = ours.propagate, debug
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            root.addHandler(silent)  # without any handler, Python prints warnings to stderr by itself
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        ours.addHandler(handler)
        try:
            yield
        finally:
            ours.removeHandler(handler)
            ours.propagate = propagate
            root.removeHandler(silent)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{PROGRAM}: {record.levelname.lower()}: {' '.join(record.getMessage().split())}"
