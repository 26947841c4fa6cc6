"""Do loss and gradients on every mesh of 8 devices equal those of one device, for every family, format and sharing?

Small models with drawn weights (tests/sharded.py) on ten meshes of devices that the CPU pretends to have: data, fsdp,
model and sequence alone, in pairs and threes, and with dcn. A deviation is the largest of the loss and of any element
of the gradient, over the largest element of its leaf; everything is float32.

    python experiments/mesh_equality.py --json experiments/mesh_equality.json
    python experiments/mesh_equality.py bases --json experiments/mesh_equality.json    # one structure anew

Result (`mesh_equality.json`; an hour on two cores that did other work beside it): 49 structures, families and formats
among them, on 10 meshes each: at most 6.3e-6. The tests try one of the ten meshes for each structure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"


def deviations(name: str, meshes: tuple[str, ...]) -> dict[str, float]:
    """{mesh: the largest deviation} of a structure, in a process of its own."""
    command = [sys.executable, str(TESTS / "sharded.py"), json.dumps([name, *meshes])]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{name}: {run.stderr[-2000:]}")
    return json.loads(run.stdout)[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of structures or families; all when left out")
    parser.add_argument("--json", type=Path, help="where to write the deviations")
    parser.add_argument("--processes", type=int, default=2, help="that measure at once")
    arguments = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    import sharded

    from flaxcompress.families import FAMILIES

    known = [*sharded.structures(), *FAMILIES]
    if unknown := [name for name in arguments.names if name not in known]:
        parser.error(f"no structure {unknown[0]!r}; there are {', '.join(known)}")
    names = arguments.names or known
    found: dict[str, dict[str, float]] = {}
    if arguments.names and arguments.json and arguments.json.exists():
        found = json.loads(arguments.json.read_text())
    with ThreadPoolExecutor(arguments.processes) as pool:
        for name, of_meshes in zip(names, pool.map(lambda n: deviations(n, sharded.MESHES), names), strict=True):
            found[name] = of_meshes
            mesh = max(of_meshes, key=of_meshes.__getitem__)
            print(f"{name:32} {of_meshes[mesh]:.1e}  ({mesh})", flush=True)
    largest = max(max(each.values()) for each in found.values())
    print(f"{len(found)} structures on {len(sharded.MESHES)} meshes: at most {largest:.1e}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
