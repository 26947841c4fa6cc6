"""Does a run that is killed end as one that is not; and do its devices matter?

A small ALBERT learns masked words and sentence order from docstrings of Python's standard library, with dropout,
microbatches and averaged weights, in float32, through `flaxcompress train`:

1. one process, killed (SIGKILL) at ten random moments and started again: the trained model, bit for bit;
2. two processes on this machine, one of them killed at a random moment, three times: how long the other takes to end
   and what it says; then both are started again: the trained model, bit for bit;
3. one checkpoint, taken up on 1, 2, 4 and 8 devices that the CPU pretends to have, in meshes of several shapes: the
   largest relative difference of the losses that follow.

    python experiments/killed_runs.py --json experiments/killed_runs.json

Result (`killed_runs.json`; two cores): 1. equal; killed at steps 36 to 227 of 500, twice while it started. 2. equal;
the other process ended after 0.2 s where the first one was killed (JAX ends it, status -6), after 1.2 s otherwise
(status 1), both with "another process of the run has ended …; start all of them again". 3. at most 1.8e-7 over the 260
steps that followed; 0 on one device.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 500
SETTINGS = {
    "model": {
        "config": {
            **{"width": 64, "embedding_width": 32, "layers": 4, "heads": 8, "feed_forward_width": 256},
            **{"sharing": "all", "dropout": 0.1, "attention_dropout": 0.1},
        }
    },
    "tokenizer": {"kind": "unigram", "vocabulary": 1000, "lowercase": True},
    "task": {"name": "masked_lm", "sentence_order": True},
    "data": {"train": "text.txt"},
    "training": {
        **{"steps": STEPS, "batch_size": 16, "length": 64, "accumulate": 2, "ema": 0.99},
        **{"dtype": "float32", "save_every": 20},
    },
    "optimizer": {"learning_rate": 1e-3, "warmup": 20},
    "out": "run",
}
MESHES = {
    1: ["data=1"],
    2: ["data=2", "model=2"],
    4: ["fsdp=4", "data=2,model=2"],
    8: ["data=8", "data=2,fsdp=2,model=2"],
}


class Runs:
    """Starts runs in a folder."""

    def __init__(self, folder: Path):
        import yaml

        from flaxcompress.data import calibration_text

        self.folder = folder
        texts = calibration_text().train
        lines = [" ".join(texts[i : i + 6]) for i in range(0, 3000, 6)]
        (folder / "text.txt").write_text("\n".join(lines) + "\n", "utf-8")
        (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS))

    def start(self, out: str, *, devices: int = 1, mesh: str | None = None, **environment: str) -> Any:
        """A process of a run in the folder `out`."""
        command = [sys.executable, "-m", "flaxcompress", "train", "run.yaml", f"out={out}"]
        command += ["tokenizer={load: run-tokenizer}"] if (self.folder / "run-tokenizer").exists() else []
        command += [] if mesh is None else ["--mesh", mesh]
        given = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
        given |= {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"), **environment}
        given["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
        log = (self.folder / f"{out}.log").open("a")
        return subprocess.Popen(
            command, cwd=self.folder, env={**os.environ, **given}, stdout=log, stderr=subprocess.STDOUT
        )

    def pair(self, out: str) -> list[Any]:
        """Two processes of one run."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        known = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        return [self.start(out, mesh="data=2", **known, JAX_PROCESS_ID=str(number)) for number in (0, 1)]

    def losses(self, out: str) -> dict[int, float]:
        """{step: loss}."""
        text = (self.folder / out / "metrics.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return {row["step"]: row["loss"] for row in rows if "loss" in row}

    def same(self, out: str, other: str) -> bool:
        """Whether two trained models are equal, bit for bit."""
        from safetensors.numpy import load_file

        one, two = (load_file(self.folder / name / "model" / "model.safetensors") for name in (out, other))
        return one.keys() == two.keys() and all(
            np.array_equal(one[name].view(np.uint8), two[name].view(np.uint8)) for name in one
        )


def last_step(runs: Runs, out: str) -> int:
    """How far a run has come."""
    return max(runs.losses(out), default=0) if (runs.folder / out / "metrics.jsonl").exists() else 0


def wait_for(runs: Runs, out: str, processes: list[Any], step: int) -> None:
    """Returns when a run has come so far, or one of its processes has ended."""
    while last_step(runs, out) < step and all(process.poll() is None for process in processes):
        time.sleep(0.02)


def finish(processes: list[Any], what: str) -> None:
    """Waits for the end of processes that should succeed."""
    if any([process.wait() for process in processes]):
        raise SystemExit(f"{what} failed; see its log")


def one_process(runs: Runs, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kills a run again and again."""
    finish([runs.start("whole")], "the whole run")
    shutil.copytree(runs.folder / "whole" / "tokenizer", runs.folder / "run-tokenizer")
    finish([runs.start("untouched")], "a run with its tokenizer")  # resolved settings are the killed one's
    lives, done = [], 0
    for number in range(kills):
        process, began = runs.start("killed"), time.time()
        if number % 5 == 4:  # while it starts
            time.sleep(rng.uniform(1, 6))
        else:
            wait_for(runs, "killed", [process], done + rng.randint(5, 50))
            time.sleep(rng.uniform(0, 0.5))
        if process.poll() is not None:
            raise SystemExit(f"the run ended after {len(lives)} kills: {process.returncode}; give it more steps")
        process.kill()
        process.wait()
        done = last_step(runs, "killed")
        lives.append({"seconds": round(time.time() - began, 1), "step": done})
        print(f"killed after {lives[-1]['seconds']} s, at step {done}", flush=True)
    finish([runs.start("killed")], "the last part")
    return {"lives": lives, "equal": runs.same("killed", "untouched")}


def two_processes(runs: Runs, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kills one of a pair again and again."""
    finish(runs.pair("pair-whole"), "the pair")
    found = []
    for number in range(kills):
        pair, victim = runs.pair("pair-killed"), number % 2
        wait_for(runs, "pair-killed", pair, last_step(runs, "pair-killed") + rng.randint(25, 60))
        time.sleep(rng.uniform(0, 0.5))
        pair[victim].send_signal(signal.SIGKILL)
        began = time.time()
        status = pair[1 - victim].wait(timeout=300)
        seconds = time.time() - began
        pair[victim].wait()
        said = (runs.folder / "pair-killed.log").read_text().splitlines()
        fatal = "Terminating process because the JAX distributed service"
        words = next(line for line in reversed(said) if line.startswith("flaxcompress: another") or fatal in line)
        found.append({"killed": victim, "seconds": round(seconds, 1), "status": status, "said": words[:300]})
        print(found[-1], flush=True)
    finish(runs.pair("pair-killed"), "the pair's last part")
    return {"kills": found, "equal": runs.same("pair-killed", "pair-whole")}


def other_devices(runs: Runs) -> dict[str, float]:
    """Takes a checkpoint up on other devices."""
    process = runs.start("begun")
    wait_for(runs, "begun", [process], STEPS // 2)
    process.kill()
    process.wait()
    whole, found = runs.losses("untouched"), {}
    for devices, meshes in MESHES.items():
        for mesh in meshes:
            shutil.copytree(runs.folder / "begun", runs.folder / f"on-{mesh}")
            first = max(int(p.name) for p in (runs.folder / "begun" / "checkpoints").iterdir() if p.name.isdigit())
            finish([runs.start(f"on-{mesh}", devices=devices, mesh=mesh)], f"the run on {mesh}")
            here = runs.losses(f"on-{mesh}")
            followed = [step for step in here if step > first]
            found[mesh] = max(abs(here[step] - whole[step]) / whole[step] for step in followed)
            print(f"{devices} devices, {mesh}: {found[mesh]:.1e} over steps {first + 1} … {max(followed)}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the findings")
    parser.add_argument("--kills", type=int, default=10, help="of the single process")
    parser.add_argument("--keep", type=Path, help="a folder for the runs, which stays")
    arguments = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        runs = Runs(folder)
        found = {
            "one process": one_process(runs, arguments.kills, rng),
            "two processes": two_processes(runs, 3, rng),
            "devices": other_devices(runs),
        }
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
