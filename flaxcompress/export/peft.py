"""Adapters as Hugging Face PEFT stores them: a folder of the adapter alone, for the original model.

base_model.model.<module>.lora_A.weight [R, n]   = Aᵀ
base_model.model.<module>.lora_B.weight [m, R]   = Bᵀ
base_model.model.<module>.lora_magnitude_vector [m]   of DoRA
base_model.model.<module of the head>.weight     beside a head, which PEFT saves whole (`modules_to_save`)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxcompress import storage, tree
from flaxcompress.config import closest
from flaxcompress.export.peft_folder import (
    CONFIG,
    TASKS,
    WEIGHTS,
    head_tensors,
    places_of,
    read_head,
    read_settings,
    write_folder,
)
from flaxcompress.export.peft_prefix import export_prefix, load_prefix
from flaxcompress.export.torch import check_stock, stored_address
from flaxcompress.families import FAMILIES
from flaxcompress.families.base import Stored
from flaxcompress.formats import Adapted, LowRank, materialize
from flaxcompress.model import Model, replace_matrices
from flaxcompress.nn.bases import is_on_basis
from flaxcompress.tuning.lora import adapters

_PREFIX = "base_model.model."
_PLAIN = (True, False, None, "gaussian", "eva", "orthogonal")  # initializers that leave the base as it is
# Settings of PEFT's that change what is computed, and the values at which they do not.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "init_lora_weights": _PLAIN,
    "use_dora": (False, None, True),
    **dict.fromkeys(("lora_bias", "fan_in_fan_out", "use_qalora", "use_bdlora"), (False, None)),
    **dict.fromkeys(("layer_replication", "alora_invocation_tokens", "target_parameters", "arrow_config"), (None, [])),
    **dict.fromkeys(("kasa_config", "monteclora_config", "velora_config"), (None, {})),
}


def export_peft(model: Model, out: str | Path, *, overwrite: bool = False) -> Path:
    """Writes the model's adapters, and a classifier's head, as a folder that `PeftModel.from_pretrained` loads.

    A model with a prefix gives a folder of prefix tuning instead (see `export_prefix`).

    The folder is for the model that the adapters were made on: nothing else is in it, nor the head of a language model.

    Returns:
      The folder's path.

    Raises ValueError for a model without adapters, or with ones that PEFT cannot have: whose base is not the original's
    kernel (of "pissa", or `Repair`), on kernels that the family stores together, in a structure that no stock class of
    the family has, or of another form than left·right.
    """
    out, found = Path(out), adapters(model)
    if model.config.prefix_length:
        if found:
            raise ValueError("export: a PEFT folder has a prefix or adapters, not both; merge the adapters first")
        return export_prefix(model, out, overwrite=overwrite)
    if not found:
        raise ValueError("export: the model has no adapters; with_lora adds them, with_prefix a prefix")
    check_stock(model.config)
    if model.config.deltas is not None:
        raise ValueError("export: the layers add deltas to what they share, which PEFT has not; save the model instead")
    places, tensors = places_of(model.config), {}
    ranks, alphas = {}, {}
    family = FAMILIES[model.config.family]
    stored = {a: a if family.shares else stored_address(model.config, a) for a in places}
    if lost := set(found).difference(stored.values()):
        raise ValueError(f"export: stock transformers has no {min(lost)}; PEFT could not put the adapter anywhere")
    for address in (a for a in places if stored[a] in found):
        node, module = found[stored[address]], _module(places, address)
        if node.residual:
            raise ValueError(
                f"export: {stored[address]} lacks what its adapter holds (of pissa, or Repair), so that the adapter is "
                "for no original; save the model, or merge it and export torch-dense"
            )
        if not isinstance(node.delta, LowRank):
            raise ValueError(f"export: PEFT has no adapter like that of {address}")
        left, right = (np.asarray(materialize(f), np.float32) for f in (node.delta.left, node.delta.right))
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(left.T)
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(right.T)
        if node.magnitude is not None:
            tensors[f"{_PREFIX}{module}.lora_magnitude_vector"] = np.asarray(node.magnitude, np.float32)
        ranks[module], alphas[module] = node.delta.rank, node.scale * node.delta.rank
    if (magnitudes := sum(node.magnitude is not None for node in found.values())) not in (0, len(found)):
        raise ValueError(
            f"export: {magnitudes} of {len(found)} adapters have magnitudes (DoRA), which in a PEFT folder all or none "
            "have; save the model instead"
        )
    saved = head_tensors(model, places)
    tensors |= {f"{_PREFIX}{name}": value for name, value in saved.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    settings = {
        "peft_type": "LORA",
        "task_type": TASKS.get(model.config.head),
        "base_model_name_or_path": model.assets.source or None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
        "target_modules": sorted(ranks),
        "modules_to_save": sorted({name.partition(".")[0] for name in saved}) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": magnitudes > 0,
    }
    return write_folder(out, settings, tensors, overwrite=overwrite)


def load_adapter(model: Model, folder: str | Path) -> Model:
    """The model with a PEFT folder's adapters on its kernels, or its prefix, and the folder's head in place of its own.

    Raises:
      FileNotFoundError: no such folder, or not one of PEFT's.
      ValueError: another kind than LoRA and prefix tuning, settings that are not supported, and modules or shapes that
        are not this model's: the folder is for another base.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    if settings.get("peft_type") == "PREFIX_TUNING":
        return load_prefix(model, folder, settings)
    _check_settings(settings, folder)
    places, flat = places_of(model.config), tree.View(model.params)
    if not FAMILIES[model.config.family].shares and model.config.unshared().sharing != model.config.sharing:
        raise ValueError(f"{folder}: has an adapter for each layer, but the layers of this model share weights")
    linear = {a: where for a, where in places.items() if a.endswith("/kernel")}
    modules = {where.name.removesuffix(".weight"): a for a, where in linear.items() if _is_linear(where)}
    others = {where.name.removesuffix(".weight") for where in linear.values() if not _is_linear(where)}
    head: dict[str, Any] = {}
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in storage.Tensors([folder / WEIGHTS]).items():
        plain = name.removeprefix(_PREFIX)
        lora = re.fullmatch(r"(.+)\.lora_(A|B|magnitude_vector)(?:\.weight)?", plain)
        if lora is None:
            head[plain] = tensor
        else:
            pairs.setdefault(lora[1], {})[lora[2]] = np.asarray(tensor, np.float32)
    changes: dict[str, Any] = dict(read_head(model, places, head, folder))
    for module, pair in pairs.items():
        if module in others:
            raise ValueError(
                f"{folder}: {module} holds several of our kernels or is no Linear, and its adapter is not read; merge "
                "it in PEFT: merge_and_unload, then save_pretrained"
            )
        if module not in modules:
            raise ValueError(f"{folder}: made for another model: this one has no {module}; {closest(module, modules)}")
        changes[modules[module]] = _adapted(flat[modules[module]], module, pair, settings, folder)
    return replace_matrices(model, changes)


def _adapted(node: Any, module: str, pair: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> Adapted:
    wanted = {"A", "B", "magnitude_vector"} if settings.get("use_dora") else {"A", "B"}
    if set(pair) != wanted:
        there, needed = (", ".join(f"lora_{name}" for name in sorted(names)) for names in (pair, wanted))
        raise ValueError(f"{folder}: of {module} there is {there}, and {CONFIG} asks for {needed}")
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
    magnitude = pair.get("magnitude_vector")
    if magnitude is not None and magnitude.shape != (m,):
        raise ValueError(f"{folder}: made for another model: {module} has {m} columns, not {list(magnitude.shape)}")
    magnitude = None if magnitude is None else jnp.asarray(magnitude)
    delta = LowRank(left=jnp.asarray(left), right=jnp.asarray(right))
    return Adapted(base=node, delta=delta, scale=float(scale), magnitude=magnitude)


def _of_module(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name, from a dot on."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _check_settings(settings: Mapping[str, Any], folder: Path) -> None:
    if (kind := settings.get("peft_type")) != "LORA":
        raise ValueError(f"{folder}: adapters of kind {kind!r} are not read; LORA and PREFIX_TUNING are")
    for name, allowed in _SUPPORTED.items():
        if (value := settings.get(name, allowed[0])) not in allowed:
            hint = "the base was changed beside the adapter" if name == "init_lora_weights" else "merge it in PEFT"
            raise ValueError(f"{folder}: {name} {value!r} is not supported, only {allowed[0]!r}; {hint}")


def _is_linear(where: Stored) -> bool:
    """Whether it is the whole of a torch.nn.Linear."""
    return where.part is None and where.transposed and where.folded is None


def _module(places: Mapping[str, Stored], address: str) -> str:
    where = places[address]
    if not _is_linear(where):
        raise ValueError(
            f"export: {address} is a part of {where.name} or not a Linear, which PEFT adapts as a whole; save the "
            "model instead"
        )
    return where.name.removesuffix(".weight")
