"""The contestant in flaxcompress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress.encoding import compute_dtype
from flaxcompress.folder import load
from flaxcompress.nn import Transformer


class Flax:
    """A model in flaxcompress, its forward pass under jit."""

    def __init__(self, folder: Path):
        self.model = load(folder)
        network = Transformer(self.model.config, compute_dtype())
        self.device = jax.default_backend()
        self._forward = jax.jit(
            lambda params, ids, mask: network.apply({"params": params}, ids, mask, need_logits=False)
        )

    def prepare(self, ids: np.ndarray, mask: np.ndarray) -> Any:
        return jnp.asarray(ids), jnp.asarray(mask)

    def __call__(self, inputs: Any) -> Any:
        return jax.block_until_ready(self._forward(self.model.params, *inputs))

    def states(self, inputs: Any) -> np.ndarray:
        return np.asarray(self(inputs).last_hidden_state, np.float32)
