"""Which kernels tolerate few bits: each is rounded alone, and the sentence vectors' loss is measured."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flaxcompress.compress.calibrate import Calibration
from flaxcompress.compress.rounding import round_rows
from flaxcompress.compress.walk import LayerWalk
from flaxcompress.encoding import pool
from flaxcompress.formats import QuantizedSpec, materialize, nbytes
from flaxcompress.formats.quantized import Quantized
from flaxcompress.model import Model
from flaxcompress.text import Pooling

_MEASURED = 4  # bits up to which a choice is measured


@functools.partial(jax.jit, static_argnums=3)
def _loss(states, mask, reference, pooling: Pooling):
    """Σ (1 - cosine) over the batch's texts."""
    vectors = pool(states, mask, pooling)
    size = jnp.linalg.norm(vectors, axis=-1) * jnp.linalg.norm(reference, axis=-1)
    cosine = (vectors * reference).sum(-1) / jnp.maximum(size, 1e-12)
    return ((1.0 - cosine) * mask.any(1)).sum()


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
    as an order of importance it tells kernels apart that differ a hundredfold. Choices above 4 bits are not measured
    when 4 is one of them: with every bit the squared error, and with it the loss, falls to a quarter.
    """
    pooling = model.assets.pooling or Pooling()
    batches = calibration.batches(sentences, size=32, pad=model.config.pad_token, seed=1)
    measured = {b: s for b, s in specs.items() if b <= _MEASURED or _MEASURED not in specs}
    wanted, count = set(addresses), min(sentences, len(calibration.rows))
    walk = LayerWalk(model, batches)
    references, found = None, {}
    for stage in walk.stages(label="sensitivity", progress=progress):
        if references is None:
            final = walk.outcome(stage, {})
            references = [_pooled(x, mask, pooling) for x, mask in zip(final, walk.masks, strict=True)]
        for address in (a for a in stage.addresses if a in wanted):
            losses = {}
            for bits, spec in measured.items():
                rows = walk.kernel(address).T
                levels, scale = round_rows(rows, spec, weights=jnp.diagonal(stage.moments))
                rounded = materialize(Quantized.from_levels(levels, scale, spec, table=False))
                final = walk.outcome(stage, {address: rounded})
                parts = zip(final, walk.masks, references, strict=True)
                losses[bits] = sum(float(_loss(x, mask, r, pooling)) for x, mask, r in parts) / count
            for bits in specs.keys() - measured.keys():
                losses[bits] = losses[_MEASURED] * 0.25 ** (bits - _MEASURED)
            found[address] = losses
    return {address: found[address] for address in addresses}


_pooled = functools.partial(jax.jit, static_argnums=2)(pool)


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


def spend(sizes: Mapping[str, Mapping[int, int]], budget: int) -> dict[str, int]:
    """Bits per matrix that take `budget` bytes or just more: raised one after the other until they do, or all are."""
    chosen = {a: min(sizes[a], key=lambda b, a=a: sizes[a][b]) for a in sizes}
    total = sum(sizes[a][b] for a, b in chosen.items())
    for address, choices in sizes.items():
        for bits in sorted(choices, key=lambda b, a=address: sizes[a][b]):
            if total >= budget:
                return chosen
            total += sizes[address][bits] - sizes[address][chosen[address]]
            chosen[address] = bits
    return chosen


def spec_bytes(shape: tuple[int, int], spec: QuantizedSpec) -> int:
    """Bytes of a kernel [n, m] in a quantized format."""
    zeros: Any = lambda key, size, dtype: jnp.zeros(size, dtype)  # noqa: E731
    return nbytes(jax.eval_shape(lambda key: spec.init(key, shape, zeros, table=False), jax.random.key(0)))
