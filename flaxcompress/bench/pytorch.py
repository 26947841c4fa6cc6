"""The contestants in PyTorch. Their own process does not import JAX (see probe.py), so this file must not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from flaxcompress.bench.runtimes import OWN
from flaxcompress.export.code import check_code
from flaxcompress.export.quiet import quiet_transformers


class Torch:
    """A model in PyTorch, on the CPU in float32: stock with SDPA attention, or a saved folder's own code."""

    def __init__(self, folder: Path):
        import torch
        from transformers import AutoModel

        own = json.loads((folder / "config.json").read_text("utf-8")).get("model_type") == OWN
        options: dict[str, Any] = {"trust_remote_code": True} if own else {"attn_implementation": "sdpa"}
        if own:
            check_code(folder)
        with quiet_transformers():
            network = AutoModel.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True, **options)
        self._network = network.eval()

    def prepare(self, ids: np.ndarray, mask: np.ndarray) -> Any:
        import torch

        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(mask.astype(np.int64))

    def __call__(self, inputs: Any) -> Any:
        import torch

        with torch.inference_mode():
            return self._network(input_ids=inputs[0], attention_mask=inputs[1])

    def states(self, inputs: Any) -> np.ndarray:
        return self(inputs).last_hidden_state.numpy()


def sentence_transformer(folder: Path) -> Any:
    """A folder in sentence-transformers, on the CPU."""
    from sentence_transformers import SentenceTransformer

    own = json.loads((folder / "config.json").read_text("utf-8")).get("model_type") == OWN
    if own:
        check_code(folder)
    with quiet_transformers():
        return SentenceTransformer(str(folder), device="cpu", trust_remote_code=own, local_files_only=True)
