"""Adapters as Hugging Face PEFT stores them: a folder of the adapter alone, for the original model.

base_model.model.<module>.lora_A.weight [R, n]   = Aᵀ
base_model.model.<module>.lora_B.weight [m, R]   = Bᵀ
base_model.model.<module of the head>.weight     beside a head, which PEFT saves whole (`modules_to_save`)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxcompress import storage, tree
from flaxcompress.config import ModelConfig, closest
from flaxcompress.families import FAMILIES
from flaxcompress.families.base import Stored
from flaxcompress.formats import Adapted, LowRank, materialize
from flaxcompress.lora import adapters
from flaxcompress.model import Model, replace_matrices
from flaxcompress.nn.bases import is_on_basis

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TASKS = {
    "none": "FEATURE_EXTRACTION",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "span": "QUESTION_ANS",
    "causal_lm": "CAUSAL_LM",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
}
_OURS_ONLY = {  # settings of PEFT's that change what is computed, and the value at which they do not
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "layer_replication": None,
    "alora_invocation_tokens": None,
}


def export_peft(model: Model, out: str | Path, *, overwrite: bool = False) -> Path:
    """Writes the model's adapters, and its head where it has one, as a folder that `PeftModel.from_pretrained` loads.

    The folder is for the model that the adapters were made on: what stays as it is is not in it.

    Returns:
      The folder's path.

    Raises ValueError for a model without adapters, or with ones that PEFT cannot have: on factors, on kernels that the
    family stores together, or of another form than left·right.
    """
    out, found = Path(out), adapters(model)
    if not found:
        raise ValueError("export: the model has no adapters; with_lora adds them")
    places, tensors = _places(model.config), {}
    ranks, alphas = {}, {}
    for address, node in found.items():
        module = _module(places, address)
        if not isinstance(node.delta, LowRank):
            raise ValueError(f"export: PEFT has no adapter like that of {address}")
        left, right = (np.asarray(materialize(f), np.float32) for f in (node.delta.left, node.delta.right))
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(left.T)
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(right.T)
        ranks[module], alphas[module] = node.delta.rank, node.scale * node.delta.rank
    saved = _head_tensors(model, places)
    tensors |= {f"{_PREFIX}{name}": value for name, value in saved.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    settings = {
        "peft_type": "LORA",
        "task_type": _TASKS.get(model.config.head),
        "base_model_name_or_path": model.assets.source or None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
        "target_modules": sorted(ranks),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in saved}) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
    with storage.new_folder(out, overwrite=overwrite) as folder:
        storage.write_tensors(folder / WEIGHTS, tensors)
        storage.write_files(folder, {CONFIG: json.dumps(settings, indent=2) + "\n"})
    return out


def load_adapter(model: Model, folder: str | Path) -> Model:
    """The model with the adapters of a PEFT folder on its kernels, and the folder's head in place of its own.

    Raises:
      FileNotFoundError: no such folder, or not one of PEFT's.
      ValueError: another kind of adapter than LoRA, settings that are not supported, and modules or shapes that are not
        this model's: the folder is for another base.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"load_adapter: {folder} has no {name}; PEFT's save_pretrained writes it")
    settings = json.loads((folder / CONFIG).read_text("utf-8"))
    _check_settings(settings, folder)
    places, flat = _places(model.config), tree.View(model.params)
    modules = {where.name.removesuffix(".weight"): a for a, where in places.items() if a.endswith("/kernel")}
    heads = {where.name: a for a, where in places.items() if a.startswith("head/")}
    changes: dict[str, Any] = {}
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in storage.Tensors([folder / WEIGHTS]).items():
        plain = name.removeprefix(_PREFIX)
        lora = re.fullmatch(r"(.+)\.lora_(A|B)\.weight", plain)
        if lora is None:
            if plain not in heads:
                raise ValueError(f"{folder}: {name} is no tensor of this model's head ({model.config.head})")
            changes[heads[plain]] = jnp.asarray(places[heads[plain]].read(np.asarray(tensor, np.float32)))
        else:
            pairs.setdefault(lora[1], {})[lora[2]] = np.asarray(tensor, np.float32)
    for module, pair in pairs.items():
        if module not in modules:
            raise ValueError(f"{folder}: made for another model: this one has no {module}; {closest(module, modules)}")
        changes[modules[module]] = _adapted(flat[modules[module]], module, pair, settings, folder)
    for address, node in changes.items():
        if tuple(node.shape) != tuple(flat[address].shape):
            raise ValueError(f"{folder}: {address} is {list(node.shape)} there, and {list(flat[address].shape)} here")
    return replace_matrices(model, changes)


def _adapted(node: Any, module: str, pair: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> Adapted:
    if set(pair) != {"A", "B"}:
        raise ValueError(f"{folder}: of {module} there is lora_{next(iter(pair))} alone")
    if isinstance(node, Adapted) or is_on_basis(node):
        raise ValueError(f"{folder}: {module} has an adapter already, or stands on a shared basis; merge it first")
    left, right = pair["A"].T, pair["B"].T
    n, m = node.shape
    if left.shape[0] != n or right.shape[1] != m or left.shape[1] != right.shape[0]:
        shapes = f"{list(pair['A'].shape)} and {list(pair['B'].shape)}"
        raise ValueError(f"{folder}: made for another model: {module} maps {n} to {m} here, its factors are {shapes}")
    rank = left.shape[1]
    expected = _of_module(settings.get("rank_pattern"), module, settings.get("r", 8))
    if rank != expected:
        raise ValueError(f"{folder}: {module} has rank {rank}, and {CONFIG} says {expected}")
    alpha = _of_module(settings.get("alpha_pattern"), module, settings.get("lora_alpha", 8))
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return Adapted(base=node, delta=LowRank(left=jnp.asarray(left), right=jnp.asarray(right)), scale=float(scale))


def _of_module(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name, from a dot on."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _check_settings(settings: Mapping[str, Any], folder: Path) -> None:
    if (kind := settings.get("peft_type")) != "LORA":
        raise ValueError(f"{folder}: adapters of kind {kind!r} are not read; LORA is")
    for name, only in _OURS_ONLY.items():
        if (value := settings.get(name, only)) not in (only, None):
            raise ValueError(f"{folder}: {name} {value!r} is not supported, only {only!r}")


def _places(config: ModelConfig) -> dict[str, Stored]:
    """{address: where stock transformers keeps it}, with the prefix that a head brings along."""
    family = FAMILIES[config.family]
    prefix = family.prefix(config.head) if config.head != "none" else ""
    names = family.names(config.replace(formats=()))
    return {a: w if a.startswith("head/") else w._replace(name=prefix + w.name) for a, w in names.items()}


def _module(places: Mapping[str, Stored], address: str) -> str:
    where = places.get(address)
    if where is None:
        raise ValueError(f"export: stock transformers has no {address}; PEFT could not put the adapter anywhere")
    if where.part is not None or not where.transposed:
        raise ValueError(
            f"export: {address} is a part of {where.name} or not a Linear, which PEFT adapts as a whole; save the "
            "model instead"
        )
    return where.name.removesuffix(".weight")


def _head_tensors(model: Model, places: Mapping[str, Stored]) -> dict[str, np.ndarray]:
    """The head's tensors, for heads that PEFT saves; that of a language model stays with the base."""
    if model.config.head not in ("sequence_classification", "token_classification", "span"):
        return {}
    flat, found = tree.View(model.params), {}
    for address, where in places.items():
        if address.startswith("head/"):
            array = np.asarray(materialize(flat[address]), np.float32)
            found[where.name] = np.ascontiguousarray(array.T if where.transposed else array)
    return found
