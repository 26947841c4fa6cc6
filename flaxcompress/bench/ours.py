"""The contestant in flaxcompress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress.folder import load


class Flax:
    """A model in flaxcompress, called as users call it; its head, which no contestant computes, is left out."""

    def __init__(self, folder: Path):
        model = load(folder)
        params = {name: part for name, part in model.params.items() if name != "head"}
        self.model = model.replace(params=params, config=model.config.replace(head="none"))  # pyright: ignore[reportAttributeAccessIssue]
        self.device = jax.default_backend()

    def prepare(self, ids: np.ndarray, mask: np.ndarray) -> Any:
        return jnp.asarray(ids), jnp.asarray(mask)

    def __call__(self, inputs: Any) -> Any:
        return jax.block_until_ready(self.model(*inputs))

    def states(self, inputs: Any) -> np.ndarray:
        return np.asarray(self(inputs).last_hidden_state, np.float32)
