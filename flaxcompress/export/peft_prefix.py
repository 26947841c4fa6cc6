"""Prefixes as Hugging Face PEFT stores them (PrefixTuningConfig), for causal models.

prompt_embeddings [P, L·2·K·d]     read as [P, 2L, K, d]: 2l are the keys of layer l, 2l + 1 its values
base_model.<module of the head>.weight

Decoders alone: the encoders of transformers 5 take no keys and values from outside. PEFT puts them into the cache,
behind norms of queries and keys and rotary positions, so that neither is applied to them, and the tokens' positions
begin at P.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress import storage, tree
from flaxcompress.config import ModelConfig
from flaxcompress.export.peft_folder import TASKS, WEIGHTS, head_tensors, places_of, read_head, write_folder
from flaxcompress.export.torch import check_stock, stored_address
from flaxcompress.model import Model, replace_matrices
from flaxcompress.tuning.prefix import with_prefix

_PREFIX, _NAME = "base_model.", "prompt_embeddings"


def export_prefix(model: Model, out: Path, *, overwrite: bool = False) -> Path:
    """Writes the model's prefix, and a classifier's head, as a folder that `PeftModel.from_pretrained` loads.

    Raises ValueError for what PEFT cannot have a prefix for: encoders, models with a window or a decoder of their own,
    and structures that no stock class of the family has.
    """
    config, flat = model.config, tree.View(model.params)
    length = config.prefix_length
    base = config.replace(prefix_length=0, positions=config.positions + length)
    _check(base, "export")
    check_stock(base)
    layers = []
    for layer in range(config.layers):
        for name in ("key", "value"):
            layers.append(
                np.asarray(flat[stored_address(config, f"layers/{layer}/attention/prefix/{name}")], np.float32)
            )
    saved = head_tensors(model, places_of(base))
    settings = {
        "peft_type": "PREFIX_TUNING",
        "task_type": TASKS.get(config.head),
        "base_model_name_or_path": model.assets.source or None,
        "num_virtual_tokens": length,
        "num_layers": config.layers,
        "num_attention_heads": config.groups,
        "token_dim": config.groups * config.head_dim,
        "encoder_hidden_size": config.groups * config.head_dim,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "modules_to_save": sorted({name.partition(".")[0] for name in saved}) or None,
        "inference_mode": True,
    }
    tensors = {_NAME: np.concatenate(layers, axis=1), **{f"{_PREFIX}{name}": x for name, x in saved.items()}}
    return write_folder(out, settings, tensors, overwrite=overwrite)


def load_prefix(model: Model, folder: Path, settings: Mapping[str, Any]) -> Model:
    """The model with the prefix of a PEFT folder, and the folder's head in place of its own.

    Raises ValueError for a prefix of other shapes, a model that shares attention, and what `export_prefix` refuses.
    """
    config = model.config
    _check(config, f"{folder}")
    if config.sharing.attention != tuple(range(config.layers)):
        raise ValueError(f"{folder}: has keys and values for each layer, but the layers of this model share attention")
    if (stacks := settings.get("num_transformer_submodules") or 1) != 1:
        raise ValueError(f"{folder}: num_transformer_submodules {stacks} is not supported, only 1")
    tensors = dict(storage.Tensors([folder / WEIGHTS]).items())
    if _NAME not in tensors:
        raise ValueError(f"{folder}: {WEIGHTS} has no {_NAME}, but {', '.join(sorted(tensors))}")
    whole = np.asarray(tensors.pop(_NAME), np.float32)
    length, width = settings.get("num_virtual_tokens"), config.groups * config.head_dim
    if whole.shape != (length, 2 * config.layers * width):
        raise ValueError(
            f"{folder}: made for another model: {_NAME} is {list(whole.shape)}, for {settings.get('num_layers')} "
            f"layers of {settings.get('num_attention_heads')} heads; this one needs "
            f"{[length, 2 * config.layers * width]}, for {config.layers} layers of {config.groups}"
        )
    head = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    changes: dict[str, Any] = dict(read_head(model, places_of(config), head, folder))
    for number, part in enumerate(np.split(whole, 2 * config.layers, axis=1)):
        name = ("key", "value")[number % 2]
        changes[f"layers/{number // 2}/attention/prefix/{name}"] = jnp.asarray(part)
    return replace_matrices(with_prefix(model, length=whole.shape[0], key=jax.random.key(0)), changes)


def _check(config: ModelConfig, where: str) -> None:
    if not config.causal or config.decoder is not None:
        raise ValueError(
            f"{where}: PEFT has prefixes for causal models alone, since encoders take no keys and values from outside; "
            "save the model instead"
        )
    if config.window:
        raise ValueError(f"{where}: a prefix is seen from everywhere, but in PEFT not from beyond a window")
