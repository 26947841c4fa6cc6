"""Do CP, Tucker and tensor trains hold a trained kernel better than two low-rank factors of as many values?

Kernels of all-MiniLM-L6-v2, a quarter of their values, whitened with the moments of 192 docstrings: 384×1536 as
384×32×48, 384×384 as 384×16×24, 1536×384 as 1536×16×24 (`Tensorize` as it is by default).

    python experiments/tensor_kernels.py run
    python experiments/tensor_kernels.py table

Result (`tensor_kernels.json`): E‖x(W - Ŵ)‖² over E‖xW‖² (FLOPs over the matrix's, seconds on a shared core):

                          kernel              low rank                tucker                    cp          tensor_train
        layers/0/attention/query    0.1599 (0.25, 0 s)    0.1656 (0.34, 1 s)   0.2072 (0.45, 10 s)    0.1627 (0.31, 1 s)
        layers/2/attention/value    0.2285 (0.25, 0 s)    0.2374 (0.34, 0 s)    0.3494 (0.45, 7 s)    0.2329 (0.31, 1 s)
       layers/4/attention/output    0.1266 (0.25, 0 s)    0.1334 (0.34, 0 s)    0.2480 (0.45, 7 s)    0.1299 (0.31, 1 s)
        layers/1/feed_forward/up    0.0510 (0.25, 0 s)    0.0517 (0.45, 1 s)   0.0866 (1.00, 61 s)    0.0517 (0.37, 2 s)
        layers/3/feed_forward/up    0.0700 (0.25, 0 s)    0.0709 (0.45, 1 s)   0.1143 (1.00, 59 s)    0.0709 (0.37, 1 s)
      layers/2/feed_forward/down    0.0085 (0.25, 0 s)    0.0085 (0.27, 9 s)   0.0126 (0.30, 16 s)   0.0085 (0.26, 13 s)

No: the whitened truncated SVD is never behind, and takes the fewest operations. The outputs of a kernel have no order
that a second digit could use, so that Tucker and trains at their best are low rank with a little overhead, and CP,
which forces structure on the outputs, is worse; of a 384×1536 kernel it is cheaper multiplied back (1.00). Tucker is as
good as that only because `Tensorize` cuts the rank of the inputs' mode alone, and leaves those of the outputs full.

Cost: some minutes, one core.
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
KEEPS = (0.25,)
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
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    done = {(r["kernel"], r["keep"], r["form"]) for r in results}
    for address in KERNELS:
        w, c = np.asarray(flat[address], np.float64), moments[address.removesuffix("/kernel")]
        n, m = w.shape
        total = np.einsum("nm,nk,km->", w, c, w)
        for keep in KEEPS:
            rank = int(keep * n * m / (n + m))
            factors = linalg.output_pca(w, rank, c)
            left = (factors.spectrum[rank:] ** 2).sum() / total
            entry = {"kernel": address, "keep": keep, "form": "low rank", "values": rank * (n + m) / (n * m)}
            if (address, keep, "low rank") not in done:
                results.append({**entry, "error": float(left), "flops": rank * (n + m) / (n * m), "seconds": 0.0})
            for kind in ("tucker", "cp", "tensor_train"):
                if (address, keep, kind) in done:
                    continue
                step = Tensorize(pattern=address, kind=kind, keep=keep)
                spec = parse_spec(step.plan(model.config).format_rule(address))
                assert isinstance(spec, DecomposedSpec)
                begin = time.perf_counter()
                node = compress_matrix(w, spec, moments=c)
                seconds = time.perf_counter() - begin
                e = np.asarray(jax.device_get(node.materialize()), np.float64) - w
                entry = {"kernel": address, "keep": keep, "form": kind, "values": spec.values() / (n * m)}
                entry |= {"error": float(np.einsum("nm,nk,km->", e, c, e) / total), "seconds": seconds}
                results.append({**entry, "flops": matmul_flops(node) / (2 * n * m), "spec": spec.to_json()})
                print(results[-1], flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def print_table() -> None:
    results = json.loads(RESULTS.read_text())
    forms = ("low rank", "tucker", "cp", "tensor_train")
    print(f"    {'kernel':>28}" + "".join(form.rjust(22) for form in forms))
    for keep in KEEPS:
        for address in KERNELS:
            found = {r["form"]: r for r in results if r["kernel"] == address and r["keep"] == keep}
            if found:
                cells = (
                    f"{found[f]['error']:.4f} ({found[f]['flops']:.2f}, {found[f]['seconds']:.0f} s)" for f in forms
                )
                print(f"    {address.removesuffix('/kernel'):>28}" + "".join(cell.rjust(22) for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    {"run": run, "table": print_table}[parser.parse_args().action]()


if __name__ == "__main__":
    main()
