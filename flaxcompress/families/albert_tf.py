"""ALBERT as Google released it: TensorFlow variables, here in an .npz of arrays, beside albert_config.json.

    reader = tf.train.load_checkpoint("model.ckpt-best")
    np.savez("albert.npz", **{name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()})

Kernels are stored [in, out], as here. "gelu" means its tanh approximation in Google's code.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flaxcompress.config import ModelConfig
from flaxcompress.families import albert
from flaxcompress.families.base import Checkpoint, Names, Stored, refuse
from flaxcompress.text import Assets, read_assets

_CONFIGS = ("albert_config.json", "config.json")
_MARK = re.compile(r"bert/encoder/transformer/group_\d+/inner_group_0/.+")
_FIXED = {"net_structure_type": 0, "gap_size": 0, "num_memory_blocks": 0, "down_scale_factor": 1}
_IGNORED = re.compile(r".*/(adam_[mv]|AdamWeightDecayOptimizer(_1)?|LAMBOptimizer(_1)?)|global_step|.*beta[12]_power")
# Spellings of other releases: TensorFlow Hub's prefix, variables' ":0", and scopes without their number.
_RENAMES = (
    (r":0$", ""),
    (r"^module/", ""),
    (r"/attention/(self|output)/", r"/attention_1/\1/"),
    (r"/ffn/intermediate/", "/ffn_1/intermediate/"),
)


def canonical(name: str) -> str:
    """A variable's name in the spelling of `names`."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def names(config: ModelConfig) -> Names:
    """{address: variable}, a group's weights once."""
    out = Names()

    def linear(address: str, name: str) -> None:
        out[f"{address}/kernel"], out[f"{address}/bias"] = Stored(f"{name}/kernel"), Stored(f"{name}/bias")

    def norm(address: str, name: str) -> None:
        out[f"{address}/scale"], out[f"{address}/bias"] = Stored(f"{name}/gamma"), Stored(f"{name}/beta")

    out["embedding/token"] = Stored("bert/embeddings/word_embeddings")
    out["embedding/position"] = Stored("bert/embeddings/position_embeddings")
    if config.segments:
        out["embedding/segment"] = Stored("bert/embeddings/token_type_embeddings")
    norm("embedding/norm", "bert/embeddings/LayerNorm")
    linear("embedding/projection", "bert/encoder/embedding_hidden_mapping_in")
    for group in range(config.sharing.sets("attention")):
        ours, theirs = f"layers/{group}", f"bert/encoder/transformer/group_{group}/inner_group_0"
        for projection in ("query", "key", "value"):
            linear(f"{ours}/attention/{projection}", f"{theirs}/attention_1/self/{projection}")
        linear(f"{ours}/attention/output", f"{theirs}/attention_1/output/dense")
        linear(f"{ours}/feed_forward/up", f"{theirs}/ffn_1/intermediate/dense")
        linear(f"{ours}/feed_forward/down", f"{theirs}/ffn_1/intermediate/output/dense")
        norm(f"{ours}/norms/attention", f"{theirs}/LayerNorm")
        norm(f"{ours}/norms/feed_forward", f"{theirs}/LayerNorm_1")
    if config.pooler:
        linear("pooler/dense", "bert/pooler/dense")
    if config.head in ("masked_lm", "pretraining"):
        linear("head/transform", "cls/predictions/transform/dense")
        norm("head/norm", "cls/predictions/transform/LayerNorm")
        out["head/bias"] = Stored("cls/predictions/output_bias")
    outputs = {"pretraining": ("head/order", "cls/seq_relationship/"), "sequence_classification": ("head/output", "")}
    if config.head in outputs:
        address, scope = outputs[config.head]
        out[f"{address}/kernel"] = Stored(f"{scope}output_weights", transposed=True)
        out[f"{address}/bias"] = Stored(f"{scope}output_bias")
    return out


def read_config(stated: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """albert_config.json -> ModelConfig; the head is the one whose variables there are."""
    for key, only in _FIXED.items():
        refuse(stated, key, only)
    gelu = {"hidden_act": "gelu_new"} if stated.get("hidden_act", "gelu") == "gelu" else {}
    config = albert.read_config({**stated, **gelu, "architectures": []})
    config = config.replace(pooler="bert/pooler/dense/kernel" in shapes)
    if "output_weights" in shapes:
        return config.replace(head="sequence_classification", classes=shapes["output_weights"][0])
    if "cls/predictions/output_bias" not in shapes:
        return config
    order = shapes.get("cls/seq_relationship/output_weights")
    if order is None or not config.pooler:
        return config.replace(head="masked_lm")
    return config.replace(head="pretraining", classes=order[0])


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def find(path: Path) -> Path | None:
    """The .npz of ALBERT's variables that `path` is, or the only one in a folder without safetensors."""
    if path.is_file():
        return path if path.suffix == ".npz" and _is_albert(path) else None
    if not path.is_dir() or any(path.glob("*.safetensors*")):
        return None
    found = [file for file in sorted(path.glob("*.npz")) if _is_albert(file)]
    if len(found) > 1:
        raise ValueError(f"{path}: holds {len(found)} ALBERT checkpoints; name one: {', '.join(f.name for f in found)}")
    return found[0] if found else None


def _is_albert(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any(_MARK.fullmatch(canonical(name.removesuffix(".npy"))) for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        raise ValueError(f"{file}: damaged or not an .npz file") from None


def read(file: Path) -> tuple[ModelConfig, dict[str, np.ndarray], Assets]:
    """(config, {address: float32 array}, assets) of a checkpoint that `find` found.

    The tokenizer is read from tokenizer.json beside it, where there is one; a SentencePiece model is not. Raises
    ValueError for a missing config, for missing, unknown and damaged variables.
    """
    variables = _variables(file)
    config = read_config(_stated(file), {name: array.shape for name, array in variables.items()})
    wanted = names(config)
    needed = {where.name for where in wanted.values()}
    if missing := sorted(needed - variables.keys()):
        raise ValueError(f"{file}: {len(missing)} variables are missing: {', '.join(missing[:4])}")
    if extra := sorted(variables.keys() - needed):
        raise ValueError(f"{file}: {len(extra)} variables that ALBERT does not have: {', '.join(extra[:4])}")
    flat = {address: np.asarray(where.read(variables[where.name]), np.float32) for address, where in wanted.items()}
    return config, flat, read_assets(file.parent, positions=config.positions, source=file.stem)


def _variables(file: Path) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    try:
        with np.load(file, allow_pickle=False) as archive:
            for stored in archive.files:
                name = canonical(stored)
                if _IGNORED.fullmatch(name):
                    continue
                if name in out:
                    raise ValueError(f"variables {name!r} and {stored!r} are the same weight")
                out[name] = archive[stored]
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from None
    for name, array in out.items():
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ValueError(f"{file}: {name} holds {array.dtype} values that are not all finite numbers")
    return out


def _stated(file: Path) -> Mapping[str, Any]:
    for name in _CONFIGS:
        path = file.parent / name
        if not path.is_file():
            continue
        try:
            stated = json.loads(path.read_text("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(stated, dict):
            raise ValueError(f"{path}: expected an object, got {type(stated).__name__}")
        return stated
    raise ValueError(f"{file}: needs its config beside it: {' or '.join(_CONFIGS)}")


CHECKPOINT = Checkpoint(find, read)
