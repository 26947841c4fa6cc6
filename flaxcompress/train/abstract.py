"""The arrays of a training run without their values: what its step is compiled for ahead of time."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from flaxcompress import tree
from flaxcompress.config import ModelConfig
from flaxcompress.data.masking import masked_count
from flaxcompress.model import abstract_flat
from flaxcompress.train.config import TrainConfig
from flaxcompress.train.tasks import CausalLMTask, ClassificationTask, DistillTask, ImagesTask, MaskedLMTask
from flaxcompress.train.trainable import thaw_matrix


def abstract_params(config: ModelConfig) -> Any:
    """The parameters as they are trained (see `thaw_model`)."""
    flat = abstract_flat(config)
    return tree.unflatten({address: jax.eval_shape(thaw_matrix, node) for address, node in flat.items()})


def abstract_batch(settings: TrainConfig, config: ModelConfig) -> dict[str, Any]:
    """The longest batch that the task's data can give, over all processes, with the names that it has there."""
    task, rows, length = settings.task, settings.training.batch_size, settings.training.length
    integers = lambda *shape: jax.ShapeDtypeStruct((rows, *shape), jnp.int32)  # noqa: E731
    mask = jax.ShapeDtypeStruct((rows, length), bool)
    if isinstance(task, ImagesTask):
        patches = config.patches
        assert patches is not None
        pixels = (rows, patches.channels, patches.height, patches.width)
        return {"pixel_values": jax.ShapeDtypeStruct(pixels, jnp.float32), "labels": integers()}
    batch: dict[str, Any] = {"input_ids": integers(length)}
    packed = getattr(task, "pack", False)
    if isinstance(task, CausalLMTask) or (isinstance(task, DistillTask) and config.causal):
        packed = getattr(task, "pack", True)
        batch["labels"] = integers(length)
    elif isinstance(task, MaskedLMTask):
        few = integers(masked_count(length, task.mask_rate))
        batch |= {"segment_ids": integers(length), "label_positions": few, "labels": few}
        batch |= {"order_labels": integers()} if task.sentence_order else {}
    elif isinstance(task, ClassificationTask):
        labels = jax.ShapeDtypeStruct((rows,), jnp.float32 if task.regression else jnp.int32)
        batch |= {"segment_ids": integers(length), "labels": labels}
    elif isinstance(task, DistillTask):
        batch |= {"segment_ids": integers(length), "labels": integers()}
    else:  # a source and a target
        batch |= {"decoder_input_ids": integers(length), "decoder_attention_mask": mask, "labels": integers(length)}
    return {**batch, **({"packs": integers(length)} if packed else {"attention_mask": mask})}


def placed(arrays: Any, shardings: Any) -> Any:
    """Abstract arrays that know where they are."""
    one = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(one, arrays, shardings)


def count(params: Any) -> int:
    """How many numbers a tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def shard_bytes(arrays: Any) -> int:
    """Bytes of placed arrays on one device."""
    size = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize  # noqa: E731
    return sum(map(size, jax.tree.leaves(arrays)))
