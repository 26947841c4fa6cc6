"""How fast a run is: tokens per second, and the share of the device's peak that the model's arithmetic reaches."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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


class BatchShape(NamedTuple):
    """What of a batch its cost depends on.

    Attributes:
      rows: B, of the whole step, over all processes and microbatches.
      length: T, tokens of a row; patches of an image and its class token.
      targets: tokens of a row of the decoder; 0 where there is none.
      predicted: tokens of a row that the head is applied to; None: all of them.
    """

    rows: int
    length: int
    targets: int = 0
    predicted: int | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Any], processes: int = 1) -> BatchShape:
        """The shape of a batch, of which each process holds a share."""
        if "input_ids" not in batch:
            return cls(len(batch["labels"]) * processes, 0)
        rows, length = batch["input_ids"].shape
        targets = batch["decoder_input_ids"].shape[1] if "decoder_input_ids" in batch else 0
        predicted = batch["label_positions"].shape[1] if "label_positions" in batch else None
        return cls(rows * processes, length, targets, predicted)


def step_flops(config: ModelConfig, shape: BatchShape, *, teacher: ModelConfig | None = None) -> float:
    """The model's own FLOPs in a step: three times those of a forward pass; what remat repeats is not counted.

    Args:
      teacher: a second model of which a forward pass is run.
    """
    flops = 3 * _forward(config, shape)
    if teacher is not None:
        flops += _forward(teacher, shape)
    return shape.rows * flops


def _forward(config: ModelConfig, shape: BatchShape) -> float:
    """FLOPs of a forward pass over one row."""
    length = shape.length if config.patches is None else config.positions
    found = profile(_abstract(config), length=min(length, config.positions)).parts
    per_token = {part.part: part.flops_per_token for part in found}
    head = per_token.pop("head", 0.0)
    decoder = sum(per_token.pop(name) for name in list(per_token) if name.startswith("decoder"))
    out = shape.targets or length
    if shape.predicted is not None:
        out = shape.predicted
    if not _reads_tokens(config):
        out = 1
    return length * sum(per_token.values()) + shape.targets * decoder + out * head


def _reads_tokens(config: ModelConfig) -> bool:
    """Whether the head is applied to tokens, not to one vector of a sequence."""
    return config.head != "sequence_classification"


def _abstract(config: ModelConfig) -> Model:
    return Model(params=jax.eval_shape(lambda: init_params(config, jax.random.key(0))), config=config)


class Throughput:
    """Tokens (or images) per second, and MFU where the peak is known, over the last steps.

    Args:
      flops: of a step on a batch of a shape.
      peak: FLOP/s of one device; None: MFU is not told.
    """

    def __init__(self, *, flops: Callable[[BatchShape], float], peak: float | None, devices: int = 1):
        self._flops, self._peak = flops, None if peak is None else peak * devices
        self._steps: collections.deque[tuple[float, BatchShape]] = collections.deque(maxlen=_WINDOW)

    def after(self, seconds: float, shape: BatchShape) -> dict[str, float]:
        """{"tokens_per_second", "mfu"} once a step on such a batch is over; padding is counted, targets too."""
        self._steps.append((seconds, shape))
        total = sum(seconds for seconds, _ in self._steps)
        if not total > 0:
            return {}
        if not shape.length:
            return {"images_per_second": sum(s.rows for _, s in self._steps) / total, **self._mfu(total)}
        tokens = sum(s.rows * (s.length + s.targets) for _, s in self._steps)
        return {"tokens_per_second": tokens / total, **self._mfu(total)}

    def _mfu(self, total: float) -> dict[str, float]:
        if self._peak is None:
            return {}
        return {"mfu": sum(self._flops(shape) for _, shape in self._steps) / total / self._peak}


def peak_of(devices: Sequence[Any], *, measure: bool) -> float | None:
    """The peak of the first device: from the table, or measured where it is not in there and that is asked for."""
    known = peak_flops(devices[0])
    return measured_flops(devices[0]) if known is None and measure else known
