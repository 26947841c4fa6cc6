"""Does a model's compile time grow with its depth?

Tracing, lowering and compiling together, of init, of the forward pass and of its gradient, for 4 to 96 layers that own
their weights, share all of them, or share half as many sets in sequence or in turn. Nothing is run. Every measurement
starts from a fresh jit with all caches cleared and the persistent one off; rounds are interleaved.

Command (the picture lies beside the JSON):

    python experiments/compile_time.py --json experiments/compile_time.json

Cost: nine minutes with `--rounds 3` on two idle cores, as measured here. Target: the forward pass and its gradient
compile at 96 layers in at most 1.3x the time of 4. Result (JAX 0.10.2, Python 3.11, CPU; medians of seconds at 4 and at
96 layers, and their ratio; all depths are in the JSON and the picture):

              forward             gradient            init
    own       0.38  0.36  0.96    1.54  1.54  1.00    2.54  2.56  1.01
    all       0.31  0.31  0.97    1.42  1.38  0.97    1.77  1.79  1.02
    sequence  0.39  0.41  1.04    1.71  1.72  1.01    1.89  2.65  1.40
    cycle     0.40  0.44  1.15    1.66  1.70  1.02    1.95  2.60  1.33
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TARGET = 1.3  # of the deepest model's time to the shallowest one's


def config_of(layers: int, sharing: str, width: int) -> Any:
    from flaxcompress import ModelConfig, Sharing

    sets = layers // 2 if sharing in ("sequence", "cycle") else None
    return ModelConfig(
        vocabulary=1000,
        width=width,
        layers=layers,
        heads=4,
        feed_forward_width=4 * width,
        sharing=Sharing.named(sharing, layers=layers, sets=sets),
    )


def programs(config: Any, length: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """{name: (function, abstract arguments)}; the functions are new ones, so that no trace of them is kept."""
    import jax
    import jax.numpy as jnp

    from flaxcompress.model import init_params
    from flaxcompress.nn import run

    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(functools.partial(init_params, config), key)
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32)

    def init(key):
        return init_params.__wrapped__(config, key)

    def forward(params, ids):
        return run(params, config, jnp.float32, ids).last_hidden_state

    def gradient(params, ids):
        return jax.grad(lambda params: jnp.square(forward(params, ids)).mean())(params)

    return {"init": (init, (key,)), "forward": (forward, (params, ids)), "gradient": (gradient, (params, ids))}


def seconds(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[float, float]:
    """(wall, processor) time from the Python function to the executable."""
    import jax

    jax.clear_caches()
    wall, processor = time.perf_counter(), time.process_time()
    jax.jit(function).lower(*arguments).compile()
    return time.perf_counter() - wall, time.process_time() - processor


def measure(depths: list[int], kinds: list[str], rounds: int, width: int, length: int) -> list[dict[str, Any]]:
    times: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for number in range(rounds + 1):  # the first one warms up imports and the compiler, and is left out
        for kind in kinds:
            for depth in depths:
                for name, (function, arguments) in programs(config_of(depth, kind, width), length).items():
                    taken = seconds(function, arguments)
                    if number:
                        times.setdefault((name, kind, depth), []).append(taken)
        print(f"round {number} of {rounds}", flush=True)
    found = []
    for (name, kind, depth), each in times.items():
        wall, processor = np.asarray(each).T
        ratios = np.asarray(each) / np.asarray(times[name, kind, depths[0]])  # within a round
        ratio, processor_ratio = np.median(ratios, axis=0).tolist()
        entry = {"program": name, "sharing": kind, "layers": depth, "seconds": float(np.median(wall)), "ratio": ratio}
        entry["spread"] = [float(np.quantile(wall, q)) for q in (0.25, 0.75)]
        found.append(entry | {"processor_seconds": float(np.median(processor)), "processor_ratio": processor_ratio})
    return found


def plot(found: list[dict[str, Any]], file: Path) -> None:
    """Median seconds by depth, one panel per program, one line per kind of sharing; bars span the quartiles."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(entry["program"] for entry in found))
    figure, panels = pyplot.subplots(1, len(names), figsize=(3.4 * len(names), 3.2), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        for kind in dict.fromkeys(entry["sharing"] for entry in found):
            line = [entry for entry in found if (entry["program"], entry["sharing"]) == (name, kind)]
            middle = np.asarray([entry["seconds"] for entry in line])
            low, high = np.asarray([entry["spread"] for entry in line]).T
            bars = [middle - low, high - middle]
            panel.errorbar([entry["layers"] for entry in line], middle, bars, marker="o", markersize=3, label=kind)
        panel.set(title=name, xlabel="layers", ylim=(0, None))
    panels[0][0].set_ylabel("trace, lower and compile, seconds")
    panels[0][-1].legend(title="sharing", fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    import jax

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 12, 24, 48, 96])
    parser.add_argument("--sharing", nargs="+", default=["own", "all", "sequence", "cycle"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--json", type=Path, help="where the figures go; the picture gets the same name, .png")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    depths = sorted(arguments.depths)
    found = measure(depths, arguments.sharing, arguments.rounds, arguments.width, arguments.length)
    for entry in found:
        print(json.dumps(entry))
    deepest = [entry for entry in found if entry["layers"] == depths[-1] and entry["program"] != "init"]
    worst = max(deepest, key=lambda entry: entry["ratio"])
    verdict = "met" if worst["ratio"] <= TARGET else "missed"
    processor = max(entry["processor_ratio"] for entry in deepest)
    print(
        f"{depths[-1]} layers against {depths[0]}: at most {worst['ratio']:.2f}x ({worst['program']}, "
        f"{worst['sharing']}), {processor:.2f}x in processor time; the target of {TARGET}x is {verdict}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        plot(found, arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
