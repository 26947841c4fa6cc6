"""What the steps that make heads or feed-forward networks narrower have in common."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from flaxcompress import tree
from flaxcompress.compress.calibrate import Calibration
from flaxcompress.compress.matrix_statistics import check_finite
from flaxcompress.config import ModelConfig
from flaxcompress.encoding import compute_dtype
from flaxcompress.formats import materialize
from flaxcompress.model import Model
from flaxcompress.nn.transformer import run


def narrower(
    width: int | None, keep: float | None, full: int, where: str, multiple: int = 1, *, name: str = "width"
) -> int:
    """The width that `width` or `keep`, a fraction of the full one, asks for; a multiple of a number.

    Args:
      name: what is counted, in errors.

    Raises ValueError unless exactly one of them is given, and for a width outside multiple … full.
    """
    if (width is None) == (keep is None):
        raise ValueError(f"{where}: give either {name} or keep, got {name}={width}, keep={keep}")
    if keep is not None:
        if not 0 < keep <= 1:
            raise ValueError(f"{where}: keep {keep} must lie in (0, 1], the fraction of the {name} that stays")
        width = max(multiple, int(keep * full) // multiple * multiple)
    assert width is not None
    if not multiple <= width <= full or width % multiple:
        steps = f", in steps of {multiple}" if multiple > 1 else ""
        raise ValueError(f"{where}: {name} {width} is not in {multiple} … {full}{steps}")
    return width


def check_plain(config: ModelConfig, where: str, **refused: bool) -> None:
    """Raises ValueError for what the joint methods do not cover: {reason: whether it holds}, deltas and a prefix."""
    for reason, holds in {"deltas": config.deltas is not None, "a_prefix": config.prefix_length > 0, **refused}.items():
        if holds:
            raise ValueError(f"{where}: does not cover models with {reason.replace('_', ' ')}; leave the step out")


def dense_rules(config: ModelConfig, addresses: Iterable[str]) -> ModelConfig:
    """The config with the matrices at some addresses dense."""
    for address in addresses:
        if config.format_rule(address) is not None:
            config = config.with_format(address, {"kind": "dense", "dtype": "float32"})
    return config


def matrices(model: Model, prefix: str, where: str) -> dict[str, np.ndarray]:
    """{path below the prefix: dense matrix, float64}. Raises ValueError for values that are not finite."""
    view, found = tree.View(model.params), {}
    for address in view:
        if address.startswith(prefix):
            found[address.removeprefix(prefix)] = np.asarray(materialize(view[address]), np.float64)
            check_finite(found[address.removeprefix(prefix)], f"{where}: {address}")
    return found


def with_matrices(model: Model, config: ModelConfig, changes: Mapping[str, np.ndarray]) -> Model:
    """The model with some matrices exchanged or added, in a config that has their shapes."""
    arrays = {address: jnp.asarray(array, jnp.float32) for address, array in changes.items()}
    return Model(params=tree.replace(model.params, arrays), config=config, assets=model.assets)


def input_means(model: Model, calibration: Calibration, *, sentences: int) -> dict[str, Float[np.ndarray, " D"]]:
    """{address of an attention part: E[x] of what its queries, keys and values read}, summed over a set's uses."""
    config, total, tokens = model.config, None, 0
    for ids, mask in calibration.batches(sentences, pad=config.pad_token):
        found = _batch_means(model.params, ids, mask, config, compute_dtype())
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        tokens += int(mask.sum())
    assert total is not None
    means: dict[str, Any] = {}
    for first, stacked in total:
        for i, value in enumerate(np.asarray(stacked, np.float64) / tokens):
            address = f"layers/{config.sharing.attention[first + i]}/attention"
            means[address] = means.get(address, 0.0) + value
    return means


@functools.partial(jax.jit, static_argnums=(3, 4))
def _batch_means(params, ids, mask, config: ModelConfig, dtype):
    def record(inputs: Any, mask: Any) -> Any:
        return (inputs["attention"]["query"]["x"].astype(jnp.float32) * mask[..., None]).sum((0, 1))

    return run(params, config, dtype, ids, mask, need_logits=False, record=record).recorded
