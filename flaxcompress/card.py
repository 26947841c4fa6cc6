"""The model card (README.md) of a saved folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxcompress.config import ModelConfig
from flaxcompress.text import Assets


def model_card(config: ModelConfig, assets: Assets, weight_bytes: int, report: Mapping[str, Any]) -> str:
    """Markdown with the recipe, sizes, measured fidelity and the source's licence."""
    head = ["---", "library_name: flaxcompress"]
    if assets.licence:
        head.append(f"license: {assets.licence}")
    if "/" in assets.source:
        head.append(f"base_model: {assets.source}")
    head += ["tags:", "- flaxcompress", "- model-compression"]
    if assets.pooling is not None:
        head += ["- sentence-transformers", "- sentence-similarity"]
    head.append("---")
    source = assets.source or "a model built from scratch"
    lines = [
        *head,
        "",
        f"# {assets.source.rsplit('/', 1)[-1] or config.family}, {'trained' if 'training' in report else 'compressed'}",
        "",
        f"{weight_bytes / 1e6:.2f} MB of weights, made from {source} by flaxcompress.",
        *_sizes(report),
        *_fidelity(report),
        *_steps(report),
        "",
        "## Use",
        "",
        "```python",
        "import flaxcompress as fc",
        'vectors = fc.load("FOLDER").encode(["a sentence"])',
    ]
    if assets.pooling is not None:
        lines += [
            "# or, in PyTorch:",
            "from sentence_transformers import SentenceTransformer",
            'vectors = SentenceTransformer("FOLDER", trust_remote_code=True).encode(["a sentence"])',
        ]
    else:
        lines += [
            "# or, in PyTorch:",
            "from transformers import AutoModel",
            'model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True)',
        ]
    lines += ["```", "", "## Licence", ""]
    if assets.licence:
        lines.append(f"The weights carry the licence of their source ({source}): {assets.licence}.")
    else:
        lines.append(f"The source ({source}) states no licence; its terms apply to these weights.")
    return "\n".join(lines) + "\n"


def _sizes(report: Mapping[str, Any]) -> list[str]:
    rows = [(n, report[k]) for n, k in (("weights stored", "params"), ("bytes", "bytes")) if k in report]
    if not rows:
        return []
    table = [f"| {n} | {v['before']:,} | {v['after']:,} |" for n, v in rows]
    return ["", "| | before | after |", "|---|---|---|", *table]


def _fidelity(report: Mapping[str, Any]) -> list[str]:
    found = report.get("fidelity")
    if not found or found.get("mean_cosine") is None:
        return []
    return [
        "",
        "## Fidelity to the original",
        "",
        f"Measured on {found['n']:,} sentences ({found['data']}): mean cosine {found['mean_cosine']:.4f}, "
        f"rank correlation of all pairwise similarities {found['rank_correlation']:.4f}, "
        f"overlap of the 10 nearest neighbours {found['neighbour_overlap_10']:.3f}.",
    ]


def _steps(report: Mapping[str, Any]) -> list[str]:
    steps = report.get("steps")
    if not steps:
        return []
    rows = [f"| {s['name']} | {s['params']:,} | {s['bytes']:,} | {s['seconds']:.1f} |" for s in steps]
    return ["", "## Recipe", "", "| step | weights stored | bytes | seconds |", "|---|---|---|---|", *rows]
