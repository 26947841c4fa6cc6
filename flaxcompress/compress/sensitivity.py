"""Which kernels tolerate few bits: each is rounded alone, and what the answers lose is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flaxcompress import tree
from flaxcompress.compress.answers import Answers
from flaxcompress.compress.calibrate import Calibration
from flaxcompress.compress.rounding import round_rows
from flaxcompress.compress.walk import LayerWalk
from flaxcompress.formats import QuantizedSpec, materialize, nbytes
from flaxcompress.formats.quantized import Quantized
from flaxcompress.model import Model

_MEASURED = 4  # bits up to which a choice is measured


def kernel_sensitivities(
    model: Model,
    calibration: Calibration,
    specs: Mapping[int, QuantizedSpec],
    addresses: Sequence[str],
    *,
    sentences: int = 48,
    progress: bool = False,
) -> dict[str, dict[int, float]]:
    """{address: {bits: loss}} with only that kernel rounded (error-minimising scales, input-weighted); see `Answers`.

    The kernels are rounded on the original's inputs, so this neither sees how errors add up nor what healing repairs;
    as an order of importance it tells kernels apart that differ a hundredfold. Choices above 4 bits are not measured
    when 4 is one of them: with every bit the squared error, and with it the loss, falls to a quarter.
    """
    batches = calibration.batches(sentences, size=32, pad=model.config.pad_token, seed=1)
    measured = {b: s for b, s in specs.items() if b <= _MEASURED or _MEASURED not in specs}
    wanted = set(addresses)
    walk = LayerWalk(model.config, tree.View(model.params), batches)
    answers, found = None, {}
    for stage in walk.stages(label="sensitivity", progress=progress):
        if answers is None:
            answers = Answers(model, batches, walk.outcome(stage, {}))
        for address in (a for a in stage.addresses if a in wanted):
            losses = {}
            for bits, spec in measured.items():
                rows = walk.kernel(address).T
                levels, scale = round_rows(rows, spec, weights=jnp.diagonal(stage.moments))
                rounded = materialize(Quantized.from_levels(levels, scale, spec, table=False))
                losses[bits] = answers.loss_of_states(walk.outcome(stage, {address: rounded}))
            for bits in specs.keys() - measured.keys():
                losses[bits] = losses[_MEASURED] * 0.25 ** (bits - _MEASURED)
            found[address] = losses
    return {address: found[address] for address in addresses}


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
