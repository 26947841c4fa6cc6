"""Do CP, Tucker and tensor trains hold a trained kernel better than two low-rank factors of as many values?

RESULT

Cost: COST
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).with_name("tensor_kernels.json")
KERNELS = (
    *("layers/0/attention/query/kernel", "layers/2/attention/value/kernel", "layers/4/attention/output/kernel"),
    *("layers/1/feed_forward/up/kernel", "layers/3/feed_forward/up/kernel", "layers/2/feed_forward/down/kernel"),
)
KEEPS = (0.25, 0.5)
SENTENCES = 192


def run() -> None:
    import jax

    import flaxcompress as fc
    from flaxcompress import linalg, tree
    from flaxcompress.compress import Calibration, Tensorize
    from flaxcompress.compress.tensorize import compress_matrix
    from flaxcompress.data import calibration_text
    from flaxcompress.formats import DecomposedSpec, matmul_flops, parse_spec

    model = fc.load("minilm")
    flat = tree.View(model.params)
    calibration = Calibration(calibration_text(), model.assets, vocabulary=model.config.vocabulary)
    moments = calibration.input_moments(model, sentences=SENTENCES)
    results = []
    for address in KERNELS:
        w, c = np.asarray(flat[address], np.float64), moments[address.removesuffix("/kernel")]
        n, m = w.shape
        total = np.einsum("nm,nk,km->", w, c, w)
        for keep in KEEPS:
            rank = int(keep * n * m / (n + m))
            factors = linalg.output_pca(w, rank, c)
            left = (factors.spectrum[rank:] ** 2).sum() / total
            entry = {"kernel": address, "keep": keep, "form": "low rank", "values": rank * (n + m) / (n * m)}
            results.append({**entry, "error": left, "flops": rank * (n + m) / (n * m), "seconds": 0.0})
            for kind in ("tucker", "cp", "tensor_train"):
                step = Tensorize(pattern=address, kind=kind, keep=keep)
                spec = parse_spec(step.plan(model.config).format_rule(address))
                assert isinstance(spec, DecomposedSpec)
                begin = time.perf_counter()
                node = compress_matrix(w, spec, moments=c)
                seconds = time.perf_counter() - begin
                e = np.asarray(jax.device_get(node.materialize()), np.float64) - w
                entry = {"kernel": address, "keep": keep, "form": kind, "values": spec.values() / (n * m)}
                entry |= {"error": np.einsum("nm,nk,km->", e, c, e) / total, "seconds": seconds}
                results.append({**entry, "flops": matmul_flops(node) / (2 * n * m), "spec": spec.to_json()})
                print(results[-1], flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def print_table() -> None:
    results = json.loads(RESULTS.read_text())
    forms = ("low rank", "tucker", "cp", "tensor_train")
    print(f"    {'share of values':>16}{'kernel':>36}" + "".join(form.rjust(22) for form in forms))
    for keep in KEEPS:
        for address in KERNELS:
            found = {r["form"]: r for r in results if r["kernel"] == address and r["keep"] == keep}
            if found:
                cells = (
                    f"{found[f]['error']:.4f} ({found[f]['flops']:.2f}, {found[f]['seconds']:.0f} s)" for f in forms
                )
                print(f"    {keep:>16}{address:>36}" + "".join(cell.rjust(22) for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    {"run": run, "table": print_table}[parser.parse_args().action]()


if __name__ == "__main__":
    main()
