"""What all kinds of PEFT folders have: a config, tensors, and the head that was trained beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress import storage, tree
from flaxcompress.config import ModelConfig
from flaxcompress.families import FAMILIES
from flaxcompress.families.base import Stored
from flaxcompress.formats import materialize
from flaxcompress.model import Model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TASKS = {
    "none": "FEATURE_EXTRACTION",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "span": "QUESTION_ANS",
    "causal_lm": "CAUSAL_LM",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
}


def write_folder(
    out: Path, settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray], *, overwrite: bool = False
) -> Path:
    """The folder, whole or not at all."""
    with storage.new_folder(out, overwrite=overwrite) as folder:
        storage.write_tensors(folder / WEIGHTS, dict(tensors))
        storage.write_files(folder, {CONFIG: json.dumps(settings, indent=2) + "\n"})
    return out


def read_settings(folder: Path) -> dict[str, Any]:
    """The config. Raises FileNotFoundError where a file is missing."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"load_adapter: {folder} has no {name}; PEFT's save_pretrained writes it")
    return json.loads((folder / CONFIG).read_text("utf-8"))


def places_of(config: ModelConfig) -> dict[str, Stored]:
    """{address: where stock transformers keeps it}, with the prefix that a head brings along."""
    if config.patches is not None:
        raise ValueError("PEFT: the modules of image models have other names in transformers 5 than their tensors")
    family = FAMILIES[config.family]
    prefix = family.prefix(config.head) if config.head != "none" else ""
    config = config.replace(formats=())
    names = family.names(config if family.shares else config.unshared())
    return {a: w if a.startswith("head/") else w._replace(name=prefix + w.name) for a, w in names.items()}


def read_head(
    model: Model, places: Mapping[str, Stored], tensors: Mapping[str, Any], folder: Path
) -> dict[str, jax.Array]:
    """{address: array} of the head's tensors. Raises ValueError for others, and for other shapes than the model's."""
    heads, flat = {where.name: a for a, where in places.items() if a.startswith("head/")}, tree.View(model.params)
    found = {}
    for name, tensor in tensors.items():
        if name not in heads:
            raise ValueError(f"{folder}: {name} is no tensor of this model's head ({model.config.head})")
        address = heads[name]
        found[address] = jnp.asarray(places[address].read(np.asarray(tensor, np.float32)))
        here, there = (list(node.shape) for node in (flat[address], found[address]))
        if here != there:
            raise ValueError(f"{folder}: {address} is {there} there, and {here} here")
    return found


def head_tensors(model: Model, places: Mapping[str, Stored]) -> dict[str, np.ndarray]:
    """The head's tensors, for heads that PEFT saves; that of a language model stays with the base."""
    if model.config.head not in ("sequence_classification", "token_classification", "span"):
        return {}
    flat, found = tree.View(model.params), {}
    for address, where in places.items():
        if address.startswith("head/"):
            array = np.asarray(materialize(flat[address]), np.float32)
            found[where.name] = np.ascontiguousarray(array.T if where.transposed else array)
    return found
