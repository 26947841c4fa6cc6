"""How fast a run is: tokens per second, and the share of the device's peak that the model's arithmetic reaches."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flaxcompress.config import ModelConfig
from flaxcompress.evaluate import profile
from flaxcompress.model import Model, init_params

# Dense bfloat16 matrix products of one chip in FLOP/s, accumulated in float32, from NVIDIA's datasheets of the A100,
# the H100 and the H200 (which give twice as much for sparse ones) and Google Cloud's pages on TPU versions, by what
# JAX's `device_kind` is for a TPU, and begins with for a GPU. A device is a chip on all of these.
_PEAKS = (
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA GH200", 989e12),
    ("NVIDIA A100", 312e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
)
_WINDOW = 20  # steps


def peak_flops(device: Any) -> float | None:
    """FLOP/s of a device's bfloat16 matrix products; None for one that is not in the table, such as a CPU."""
    kind = device.device_kind
    exact = kind.startswith("TPU")  # "TPU v4 lite" is another chip than "TPU v4"
    return next((peak for name, peak in _PEAKS if (kind == name if exact else kind.startswith(name))), None)


def measured_flops(device: Any, *, size: int | None = None, rounds: int = 5) -> float:
    """FLOP/s that one large matrix product reaches on a device: the best of some rounds, in its usual dtype."""
    on_cpu = device.platform == "cpu"
    n = size or (2048 if on_cpu else 8192)
    x = jax.device_put(jnp.ones((n, n), jnp.float32 if on_cpu else jnp.bfloat16), device)
    product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32).astype(x.dtype))
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def step_flops(
    config: ModelConfig,
    *,
    rows: int,
    length: int,
    targets: int = 0,
    predicted: int | None = None,
    teacher: ModelConfig | None = None,
) -> float:
    """The model's own FLOPs in a step: three times those of a forward pass, what remat repeats not counted.

    Args:
      rows: B, of the whole step, microbatches together.
      length: T, tokens of a row; patches of an image.
      targets: tokens of a row of the decoder, where there is one.
      predicted: tokens of a row that the head is applied to; None: all of them.
      teacher: a second model of which a forward pass is run.
    """
    flops = 3 * _forward(config, length, targets, predicted)
    if teacher is not None:
        flops += _forward(teacher, length, targets, predicted)
    return rows * flops


def _forward(config: ModelConfig, length: int, targets: int, predicted: int | None) -> float:
    """FLOPs of a forward pass over one row."""
    found = profile(_abstract(config), length=min(length, config.positions)).parts
    per_token = {part.part: part.flops_per_token for part in found}
    out = targets or length
    if config.patches is None and predicted is not None:
        out = predicted
    if not _reads_tokens(config):
        out = 1
    head = per_token.pop("head", 0.0)
    decoder = sum(per_token.pop(name) for name in list(per_token) if name.startswith("decoder"))
    return length * sum(per_token.values()) + targets * decoder + out * head


def _reads_tokens(config: ModelConfig) -> bool:
    """Whether the head is applied to tokens, not to one vector of a sequence."""
    return config.head != "sequence_classification"


def _abstract(config: ModelConfig) -> Model:
    return Model(params=jax.eval_shape(lambda: init_params(config, jax.random.key(0))), config=config)


class Throughput:
    """Tokens per second, and MFU where the peak is known, over the last steps.

    Args:
      tokens: of one step, over all devices, padding included.
      flops: of one step, see `step_flops`.
      peak: FLOP/s of one device; None: MFU is not told.
    """

    def __init__(self, *, tokens: int, flops: float, peak: float | None, devices: int = 1):
        self._tokens, self._flops = tokens, flops
        self._peak = None if peak is None else peak * devices
        self._seconds: collections.deque[float] = collections.deque(maxlen=_WINDOW)

    def after(self, seconds: float) -> dict[str, float]:
        """{"tokens_per_second", "mfu"} once a step that took so long is over."""
        self._seconds.append(seconds)
        total = sum(self._seconds)
        if not total > 0:
            return {}
        rate = len(self._seconds) / total
        found = {"tokens_per_second": rate * self._tokens}
        return found if self._peak is None else {**found, "mfu": rate * self._flops / self._peak}


def peak_of(devices: Sequence[Any], *, measure: bool) -> float | None:
    """The peak of the first device: from the table, or measured where it is not in there and that is asked for."""
    known = peak_flops(devices[0])
    return measured_flops(devices[0]) if known is None and measure else known
