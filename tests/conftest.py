"""Fixtures that several test files use."""

import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest

# Copies of remote code go to a temporary folder, not to the user's cache; transformers reads this when it is imported.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules")


def pytest_unconfigure():
    """Removes the copies."""
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`-n` alone gives each process a stretch of neighbours, which share fixtures and compiled programs."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs are dropped after every file: thousands of them break a process."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of small public data sets, from the environment variable FLAXCOMPRESS_DATA."""
    folder = os.environ.get("FLAXCOMPRESS_DATA")
    if not folder:
        pytest.skip("needs the small public data sets: set FLAXCOMPRESS_DATA to their folder")
    return Path(folder)
