"""Do large models train on 256 chips, and what travels between them: read from the compiled step, without a TPU?

ALBERT-xxlarge (12 layers that share one block) and a Llama of 7B shape whose kernels are in low rank, at 0.6 of their
parameters, on TPU v5e 16×16; both again on 512 devices that the CPU pretends to have. Of every program: memory of a
chip, collectives, products, the roofline, and which weights are gathered over which axes, how often.

Command (libtpu is needed for v5e: pip install "jax[tpu]==0.10.2" beside the project; no TPU is):

    python experiments/plan_topologies.py --json experiments/plan_topologies.json

Result (`plan_topologies.json`; two cores, libtpu): on v5e 16×16, of 16.9 GB a chip, ALBERT-xxlarge takes 1.76 GB with
fsdp=64,model=4 (compiled in 35 s) and 3.06 GB with data=64,model=4 (178 s, beside other work); the Llama 5.65 GB with
fsdp=64,model=4 (51 s). With data=64,model=4 its weights and optimizer state alone, 34 GB a chip, do not fit, which is
said without compiling. Weights are gathered over "fsdp" alone: of ALBERT once for all layers, outside of the loop
over them; of the Llama layer by layer, as each layer has its own. On 512 devices of the CPU both compile in 7 s or
less. The settings in `pod/`: ALBERT-base on v5e 4×4 1.88 GB (88 s, beside other work), large on 8×8 1.92 GB (30 s),
xlarge on 16×16 1.95 GB (27 s).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from flaxcompress.config.yaml_file import read_yaml

ALBERT = "pod/albert_xxlarge.yaml"
CASES = {  # name: (settings, topology, mesh, changes)
    "albert-xxlarge, fsdp": (ALBERT, "v5e:16x16", "fsdp=64,model=4", {}),
    "albert-xxlarge, data": (ALBERT, "v5e:16x16", "data=64,model=4", {}),
    "llama-7b low-rank 0.6, fsdp": ("llama", "v5e:16x16", "fsdp=64,model=4", {}),
    "llama-7b low-rank 0.6, data": ("llama", "v5e:16x16", "data=64,model=4", {}),
    "albert-xxlarge, 512 devices": (ALBERT, "cpu:512", "data=4,fsdp=32,model=4", {"batch_size": 8192}),
    "llama-7b low-rank 0.6, 512 devices": ("llama", "cpu:512", "data=4,fsdp=32,model=4", {"batch_size": 512}),
    "albert-base": ("pod/albert_base.yaml", "v5e:4x4", None, {}),
    "albert-large": ("pod/albert_large.yaml", "v5e:8x8", None, {}),
    "albert-xlarge": ("pod/albert_xlarge.yaml", "v5e:16x16", None, {}),
}
# 0.6 of the values of 4096×4096 and of 4096×11008, to the nearest multiple of 64, so that meshes divide the ranks.
LLAMA = {
    "model": {
        "config": {  # the shape of Llama 2 7B (Touvron et al. 2023)
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 32000,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "formats": [
                [r"layers/\d+/attention/.*/kernel", {"kind": "low_rank", "rank": 1216}],
                [r"layers/\d+/feed_forward/.*/kernel", {"kind": "low_rank", "rank": 1792}],
            ],
        }
    },
    "task": "causal_lm",
    "training": {"batch_size": 256, "length": 2048, "remat": "full", "dtype": "bfloat16", "steps": 1},
    "data": {"train": "none"},
    "out": "none",
}


def settings_of(source: str, changes: dict[str, int]) -> Any:
    from flaxcompress.train.config import TrainConfig

    given = LLAMA if source == "llama" else read_yaml(Path(__file__).parent / source)
    return TrainConfig.from_dict({**given, "training": {**given["training"], **changes}})


def gathers(found: Any, config: Any) -> list[dict[str, Any]]:
    """The all-gathers whose result has the shape of a weight, or of its part by "model": over what and how often."""
    import jax

    from flaxcompress import tree
    from flaxcompress.train.abstract import abstract_params
    from flaxcompress.train.hlo import Listing, result_shapes, spanned

    cuts, shapes = found.mesh.get("model", 1), {}
    for address, node in tree.View(abstract_params(config)).items():
        for leaf in jax.tree.leaves(node):
            if len(leaf.shape) == 2:
                n, m = leaf.shape
                for shape in ((n, m), (n // cuts, m), (n, m // cuts)):
                    shapes.setdefault(tuple(sorted(shape)), address)
    axes = {name: found.mesh.get(name, 1) for name in ("dcn", "data", "fsdp", "sequence", "model")}
    totals: dict[tuple[Any, ...], dict[str, Any]] = {}
    for each, kind, _, turns, _ in Listing(found.program).each_collective():
        over = spanned(each.attributes, axes)[0] if kind == "all-gather" else ()
        for dims in result_shapes(each) if over else ():
            plain = tuple(sorted(d for d in dims if d > 1))
            if plain in shapes:
                name = re.search(r'op_name="([^"]*)"', each.attributes)
                made_by = name[1].rsplit("/", 1)[-1] if name else ""  # of a weight, a cast; of its gradient, a product
                key = (over, plain, turns > 1, made_by)
                entry = totals.setdefault(key, {"over": list(over), "shape": list(plain), "made_by": made_by})
                entry |= {"in_loops": turns > 1, "count": entry.get("count", 0) + turns, "like": shapes[plain]}
    return list(totals.values())


def measure(name: str) -> dict[str, Any]:
    from flaxcompress.train.chips import pretend_devices
    from flaxcompress.train.mesh import parse_mesh

    source, topology, mesh, changes = CASES[name]
    pretend_devices(topology)
    from flaxcompress.train.plan import plan
    from flaxcompress.train.plan_settings import planned_structure

    settings = settings_of(source, changes)
    found = plan(settings, topology=topology, mesh=None if mesh is None else parse_mesh(mesh), suggest=False)
    return {"case": name, **found.to_json(), "weights_gathered": gathers(found, planned_structure(settings))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="one of them alone, as JSON on standard output")
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--json", type=Path, help="where the figures go; cases that are not measured anew stay in it")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case)))
        return
    before = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    known = {entry["case"]: entry for entry in before}
    for name in arguments.only:  # in processes of their own: JAX counts its devices once
        run = subprocess.run([sys.executable, __file__, "--case", name], capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"{name}: {run.stderr[-3000:]}")
        known[name] = json.loads(run.stdout.splitlines()[-1])
        print(name, json.dumps({k: v for k, v in known[name].items() if k not in ("collectives", "case")}), flush=True)
        if arguments.json:
            ordered = [known[case] for case in CASES if case in known]
            arguments.json.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main()
