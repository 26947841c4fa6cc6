"""How fast does greedy decoding run beside PyTorch's, on the same weights and the same machine?

Command (checkpoints of llama2.c: 260,032 and 936,448 weights; PyTorch runs the folder that `flaxcompress export` wrote,
with transformers' own generate and its key/value cache):

    python experiments/decoding_speed.py models/stories260K models/babyllama105/model5000.bin

Cost: a minute. Result: see README.md; rounds are interleaved, the ratio is the median over rounds, compiling excluded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import tempfile
import time
from pathlib import Path

import numpy as np


def ours(model, batch: int, new: int):
    prompts = [[1]] * batch

    def run() -> list[list[int]]:
        return [answer.ids for answer in model.generate(prompts, max_new_tokens=new, return_ids=True)]

    return run


def pytorch(folder: Path, batch: int, new: int):
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    network = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.ones((batch, 1), dtype=torch.long)
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def run() -> list[list[int]]:
        with torch.no_grad():
            return network.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, 1:].tolist()

    return run


def main() -> None:
    import dataclasses

    import flaxcompress as fc
    from flaxcompress.bench.rounds import PAUSE
    from flaxcompress.bench.threads import torch_threads

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--new", type=int, default=200, help="tokens made in every round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("flaxcompress").setLevel(logging.ERROR)
    found = []
    for name in arguments.models:
        model = fc.load(name)
        endless = model.replace(assets=dataclasses.replace(model.assets, end_tokens=()))
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            fc.export(model, Path(folder) / "dense", format="torch-dense")
            stack.enter_context(torch_threads(True))
            for batch in (1, 16):
                runs = {
                    "ours": ours(endless, batch, arguments.new),
                    "torch": pytorch(Path(folder) / "dense", batch, arguments.new),
                }
                start = time.perf_counter()
                first = runs["ours"]()
                compiling = time.perf_counter() - start
                same = np.mean([a == b for a, b in zip(first, runs["torch"](), strict=True)])
                times: dict[str, list[float]] = {n: [] for n in runs}
                for _ in range(arguments.rounds):
                    for n, run in runs.items():
                        time.sleep(PAUSE)
                        start = time.perf_counter()
                        run()
                        times[n].append(time.perf_counter() - start)
                rate = {n: batch * arguments.new / float(np.median(t)) for n, t in times.items()}
                ratios = np.asarray(times["torch"]) / np.asarray(times["ours"])
                entry = {
                    "model": str(name),
                    "batch": batch,
                    "tokens_per_second": rate,
                    "ratio": float(np.median(ratios)),
                    "spread": [float(np.quantile(ratios, q)) for q in (0.25, 0.75)],
                    "first_call_seconds": compiling,
                    "equal_rows": float(same),
                }
                found.append(entry)
                print(json.dumps(entry), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
