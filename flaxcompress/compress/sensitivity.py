"""Which kernels tolerate few bits: each is rounded alone, and the sentence vectors' loss is measured."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress import tree
from flaxcompress.compress.calibrate import Calibration, dense_model
from flaxcompress.compress.rounding import round_rows
from flaxcompress.config import ModelConfig
from flaxcompress.formats import QuantizedSpec, nbytes
from flaxcompress.formats.quantized import Quantized
from flaxcompress.model import Model, compute_dtype, sentence_vectors
from flaxcompress.progress import progress_bar
from flaxcompress.text import Pooling


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _loss(params, ids, mask, reference, config: ModelConfig, dtype, pooling: Pooling):
    """Σ (1 - cosine) over the batch's texts."""
    vectors = sentence_vectors(params, ids, mask, config, dtype, pooling)
    size = jnp.linalg.norm(vectors, axis=-1) * jnp.linalg.norm(reference, axis=-1)
    cosine = (vectors * reference).sum(-1) / jnp.maximum(size, 1e-12)
    return ((1.0 - cosine) * mask.any(1)).sum()


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _vectors(params, ids, mask, config: ModelConfig, dtype, pooling: Pooling):
    return sentence_vectors(params, ids, mask, config, dtype, pooling)


def kernel_sensitivities(
    model: Model,
    calibration: Calibration,
    specs: Mapping[int, QuantizedSpec],
    addresses: Sequence[str],
    *,
    sentences: int = 48,
    progress: bool = False,
) -> dict[str, dict[int, float]]:
    """{address: {bits: mean 1 - cosine}} with only that kernel rounded (error-minimising scales, input-weighted).

    The kernels are rounded on the original's inputs, so this neither sees how errors add up nor what healing repairs;
    as an order of importance it tells kernels apart that differ a hundredfold.
    """
    dense = dense_model(model)
    config, dtype, pooling = dense.config, compute_dtype(), model.assets.pooling or Pooling()
    batches = calibration.batches(sentences, size=32, pad=config.pad_token, seed=1)
    references = [_vectors(dense.params, ids, mask, config, dtype, pooling) for ids, mask in batches]
    moments = calibration.input_moments(model)
    flat = tree.flatten(dense.params)
    found: dict[str, dict[int, float]] = {}
    with progress_bar("sensitivity", len(addresses), show=progress) as advance:
        for address in addresses:
            found[address] = {}
            weights = jnp.asarray(np.diagonal(moments[address.removesuffix("/kernel")]))
            for bits, spec in specs.items():
                levels, scale = round_rows(flat[address].T, spec, weights=weights)
                node = Quantized.from_levels(levels, scale, spec, table=False)
                params = tree.unflatten({**flat, address: node.materialize()})
                total = sum(
                    float(_loss(params, ids, mask, reference, config, dtype, pooling))
                    for (ids, mask), reference in zip(batches, references, strict=True)
                )
                found[address][bits] = total / min(sentences, len(calibration.rows))
            advance()
    return found


def choose_bits(
    losses: Mapping[str, Mapping[int, float]], sizes: Mapping[str, Mapping[int, int]], budget: int
) -> dict[str, int]:
    """Bits per matrix of least summed loss within `budget` bytes, by a price per byte found by bisection.

    Raises ValueError when even the smallest choice is larger, naming its size.
    """

    def choose(price: float) -> dict[str, int]:
        return {a: min(sizes[a], key=lambda b, a=a: losses[a][b] + price * sizes[a][b]) for a in losses}

    def total(chosen: Mapping[str, int]) -> int:
        return sum(sizes[a][b] for a, b in chosen.items())

    fitting = {a: min(sizes[a], key=lambda b, a=a: sizes[a][b]) for a in losses}
    if total(fitting) > budget:
        raise ValueError(f"bits: the smallest choice takes {total(fitting)} bytes, more than the {budget} allowed")
    low, high = -60.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        chosen = choose(2.0**middle)
        if total(chosen) > budget:
            low = middle
        else:
            high, fitting = middle, chosen
    # A Lagrangian choice skips sizes between its corners; spend what is left where it helps most.
    while True:
        room = budget - total(fitting)
        better = [
            ((losses[a][fitting[a]] - losses[a][b]) / (sizes[a][b] - sizes[a][fitting[a]]), a, b)
            for a in losses
            for b in sizes[a]
            if 0 < sizes[a][b] - sizes[a][fitting[a]] <= room and losses[a][b] < losses[a][fitting[a]]
        ]
        if not better:
            return fitting
        _, address, bits = max(better)
        fitting[address] = bits


def spec_bytes(shape: tuple[int, int], spec: QuantizedSpec) -> int:
    """Bytes of a kernel [n, m] in a quantized format."""
    zeros: Any = lambda key, size, dtype: jnp.zeros(size, dtype)  # noqa: E731
    return nbytes(jax.eval_shape(lambda key: spec.init(key, shape, zeros, table=False), jax.random.key(0)))
