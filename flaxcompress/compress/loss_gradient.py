"""The gradient of a language model's loss on calibration text."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress import tree
from flaxcompress.compress.calibrate import Calibration
from flaxcompress.compress.statistics import dense_model
from flaxcompress.config import ModelConfig
from flaxcompress.encoding import compute_dtype
from flaxcompress.model import Model
from flaxcompress.nn.transformer import run
from flaxcompress.progress import progress_bar


def loss_gradient(
    model: Model, calibration: Calibration, *, sentences: int = 256, progress: bool = False
) -> dict[str, np.ndarray]:
    """{address of a matrix: ∂L/∂W, its shape}, L the mean cross-entropy of the text's next tokens.

    Raises ValueError for a model that does not predict the next token. A sentence encoder has no loss whose gradient at
    the model itself is other than zero: what it is held to are its own vectors.
    """
    if model.config.head != "causal_lm":
        raise ValueError(
            f"the gradient of a loss needs a model that predicts the next token, and this one's head is "
            f"{model.config.head!r}; use allocation: energy"
        )
    dense = dense_model(model)
    total, tokens = None, 0
    batches = calibration.batches(sentences, size=8, pad=model.config.pad_token)
    with progress_bar("gradients", len(batches), show=progress) as advance:
        for ids, mask in batches:
            found = _batch_gradient(dense.params, ids, mask, dense.config, compute_dtype())
            total = found if total is None else jax.tree.map(jnp.add, total, found)
            tokens += int((mask[:, 1:] & mask[:, :-1]).sum())
            advance()
    assert total is not None
    return {a: np.asarray(n) / max(tokens, 1) for a, n in tree.flatten(total).items()}


@functools.partial(jax.jit, static_argnums=(3, 4))
def _batch_gradient(params, ids, mask, config: ModelConfig, dtype):
    def loss(params):
        logits = run(params, config, dtype, ids, mask).logits
        chances = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
        found = jnp.take_along_axis(chances, ids[:, 1:, None], -1)[..., 0]
        return -(found * (mask[:, 1:] & mask[:, :-1])).sum()

    return jax.grad(loss)(params)
