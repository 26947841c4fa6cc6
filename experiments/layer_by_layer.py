"""Does a model of 1B parameters go through compression in the memory of one layer?

A Llama of width 2048 with random bfloat16 weights, written shard by shard, is compressed by `flaxcompress compress
--low-memory` in a process of its own: the attention's kernels and those out of the feed-forwards (5632×2048, whose
inputs' second moments are the largest) cut to 0.6 of their parameters, whitened, on what the compressed layers before
give (`sequential`, which holds the moments of shifted and original inputs); then 8 bits everywhere. The process is
killed (SIGKILL) when half of the first step's layers are written, and started again.

What counts is the larger peak of resident memory of both processes (`ru_maxrss`), against 1.5 times the largest layer
in float32, its second moments once, and 2 GB.

    python experiments/layer_by_layer.py --folder SCRATCH --json experiments/layer_by_layer.json

`--layers 2` is a quick look: the peak depends on one layer, and hardly on how many there are.

Result, 2026-11-30, JAX 0.10.2 (17 layers, 1,004,607,488 parameters, one core): a peak of 2.35 GB against a bound of
2.49 GB (layer 206 MB, statistics 177 MB). The process that was killed after 8 layers of the first step reached 2.30 GB
in 300 s, the one that went on 2.35 GB in 500 s. A layer takes 38 to 62 s for both steps
together (median 40; other work shared the machine for a while). 4,018 MB in float32
became 813 MB. Before the layer that is done was let go of while the next is made, the peak was 2.76 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from flaxcompress.compress.walk import stages_of
from flaxcompress.config import ModelConfig
from flaxcompress.data import train_tokenizer
from flaxcompress.data.docstrings import docstring_sentences
from flaxcompress.families import FAMILIES
from flaxcompress.folder import open_model
from flaxcompress.formats import nbytes
from flaxcompress.model import abstract_flat

HF = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 2048},
    **{"intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu"},
    **{"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False},
    **{"torch_dtype": "bfloat16", "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0},
}
RECIPE = r"""
description: attention and what leads out of the feed-forwards at 0.6 of their parameters, then 8 bits everywhere
steps:
  - LowRank: {pattern: 'layers/\d+/(attention/.*|feed_forward/down)/kernel', keep: 0.6, sequential: true, sentences: 32}
  - Quantize: {bits: 8, rounding: mse}
"""
SLACK = 2e9  # bytes beside the layer and its statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="for the model and the result, some 10 GB")
    parser.add_argument("--layers", type=int, default=17)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    source, out = args.folder / "model", args.folder / "small"
    parameters = write_model(source, args.layers)
    text, recipe = args.folder / "text.txt", args.folder / "recipe.yaml"
    text.write_text("\n".join(docstring_sentences()), "utf-8")
    recipe.write_text(RECIPE, "utf-8")
    command = [sys.executable, "-m", "flaxcompress", "compress", source, "--recipe", recipe, "--low-memory"]
    command = [*map(str, command), "--data", str(text), "--out", str(out), "--overwrite"]
    killed = run(command, until=args.folder / ".small.work" / "step-0" / f"layers-{args.layers // 2 - 1}")
    whole = run(command)
    if whole["status"]:
        raise SystemExit(f"the run ended with status {whole['status']}")
    report = json.loads((out / "report.json").read_text("utf-8"))
    layers = [row for row in report["layers"] if row["layer"].startswith("layers/")]
    config = open_model(source).config
    size, moments = largest_layer(config), statistics_bytes(config)
    bound = 1.5 * size + moments + SLACK
    peak = max(killed["peak"], whole["peak"])
    result = {
        "parameters": parameters,
        "layers": args.layers,
        "layer_bytes": size,
        "statistics_bytes": moments,
        "bound": bound,
        "peak": peak,
        "within": peak <= bound,
        "killed": killed,
        "resumed": whole,
        "seconds_per_layer": [round(row["seconds"], 1) for row in layers],
        "seconds": round(report["seconds"], 1),
        "bytes": report["bytes"],
        "steps": report["steps"],
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


def write_model(folder: Path, layers: int) -> int:
    """Writes the checkpoint, a shard for each layer and one for each matrix outside of them; returns its parameters."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    hf = {**HF, "num_hidden_layers": layers}
    family = FAMILIES["llama"]
    config = family.read_config(hf)
    shapes, rng = abstract_flat(config), np.random.default_rng(0)
    groups: dict[str, list[str]] = {}
    names = family.names(config)
    for address in names:
        at = address.split("/")
        groups.setdefault(at[1] if at[0] == "layers" else address.replace("/", "-"), []).append(address)
    index, count = {}, 0
    for group, addresses in groups.items():
        tensors = {}
        for address in addresses:
            where, shape = names[address], shapes[address].shape
            drawn = np.ones(shape) if len(shape) == 1 else rng.standard_normal(where.shape(shape), np.float32) * 0.02
            own = f"model.{where.name}" if address.startswith(("layers", "embedding", "final")) else where.name
            tensors[own] = drawn.astype(ml_dtypes.bfloat16)
            count += drawn.size
        save_file(tensors, folder / f"model-{group}.safetensors")
        index |= dict.fromkeys(tensors, f"model-{group}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), "utf-8")
    (folder / "config.json").write_text(json.dumps(hf), "utf-8")
    assets = train_tokenizer(docstring_sentences(), "bpe", vocabulary=4000, model="decoder", max_length=2048)
    for name, content in assets.files:
        (folder / name).write_bytes(content)
    return count


def largest_layer(config: ModelConfig) -> int:
    """Bytes of a layer in float32."""
    sizes: dict[str, int] = {}
    for address, node in abstract_flat(config).items():
        if address.startswith("layers/"):
            number = address.split("/")[1]
            sizes[number] = sizes.get(number, 0) + nbytes(node)
    return max(sizes.values())


def statistics_bytes(config: ModelConfig) -> int:
    """Bytes of one second moment in float32 for each of a layer's inputs."""
    flat = abstract_flat(config)
    first = ["/".join(stage[0]) for stage in stages_of(config)]
    return sum(4 * flat[f"layers/0/{name}/kernel"].shape[0] ** 2 for name in first)


def run(command: list[str], until: Path | None = None) -> dict[str, Any]:
    """Runs a command, which is killed when `until` is there; its status, seconds, and peak of resident memory."""
    begin = time.monotonic()
    process = subprocess.Popen(command)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        if until is not None and until.is_dir():
            os.kill(process.pid, signal.SIGKILL)
            until = None
        time.sleep(0.5)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = round(time.monotonic() - begin, 1)
    return {
        "status": process.returncode,
        "seconds": seconds,
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak": usage.ru_maxrss * 1024,  # Linux counts in KiB
    }


if __name__ == "__main__":
    main()
