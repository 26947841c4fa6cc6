"""Stock Hugging Face folders, and the check that PyTorch computes from a folder what the model computes."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from importlib import import_module, util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress import storage, tree
from flaxcompress.config import GENERATING, HEADS, ModelConfig
from flaxcompress.encoding import pool, sentence_vectors
from flaxcompress.export.code import NAME, check_code
from flaxcompress.export.merge import merge_bases, merge_deltas
from flaxcompress.export.quiet import quiet_transformers
from flaxcompress.families import FAMILIES
from flaxcompress.families.base import Names, write_tensors
from flaxcompress.folder import MODEL_TYPE
from flaxcompress.formats import materialize
from flaxcompress.model import Model
from flaxcompress.nn import run
from flaxcompress.text import (
    Assets,
    Pooling,
    class_names,
    generation_config_file,
    pad_ids,
    sentence_transformers_files,
    tokenizer_config_file,
)

# What a stock folder need not say: how matrices are stored and drawn, what training does, what is adapted on the way.
_UNSAID = (
    *("formats", "sharing", "deltas", "segments", "pooler", "decoder"),
    *("dropout", "attention_dropout", "layer_dropout", "initializer", "initializer_range", "initializer_gain"),
)
FLOAT_TOLERANCE = 1e-4
INTEGER_TOLERANCE = 2e-3
SENTENCES = (
    "Yes.",
    "The river froze in November.",
    "How many moons does the fourth planet have, and which of them is the largest?",
    "She wrote 1,024 letters to the editor (none was printed), then bought the newspaper and printed them all, "
    "one a day, beside the weather report and the price of wheat.",
)


# ── stock folders ────────────────────────────────────────────────────────────────────────────────────────────────────


def export_dense(model: Model, out: str | Path, *, overwrite: bool = False) -> Path:
    """Writes a folder that stock transformers loads, without our code: every matrix dense float32, every layer its own.

    Formats are multiplied out and shared weight sets repeated, so the folder is as large as the original's; what it
    computes equals the model's output to rounding. A pooler that the model does not have is absent from the folder too:
    transformers then says so when it loads the folder and makes a random one, which changes `pooler_output` only.

    Args:
      out: the folder to write; it appears whole or not at all.
      overwrite: replaces a folder that exists and is not empty.

    Returns:
      The folder's path.

    Raises:
      ValueError: `out` exists and is not empty, or cannot be written.
    """
    out = Path(out)
    if model.config.head not in HEADS:
        raise ValueError(
            f"export: the head {model.config.head!r} is of your own, and no stock class has it; export the model "
            'without: with_head(model, "none")'
        )
    if model.config.lexicon is not None:
        raise ValueError(
            "export: no stock class has a lexicon; save the model instead, whose folder PyTorch loads, too"
        )
    config, tensors = stock_tensors(model)
    names = class_names(model.assets, config.classes)
    hf = {**FAMILIES[config.family].write_config(config), **names, "dtype": "float32"}
    with storage.new_folder(out, overwrite=overwrite) as folder:
        storage.write_tensors(folder / storage.WEIGHTS, tensors)
        files: dict[str, str | bytes] = dict(model.assets.files)
        files |= tokenizer_config_file(model.assets)
        files |= sentence_transformers_files(model.assets, config.width)
        if config.head in GENERATING:
            files |= generation_config_file(model.assets, config.pad_token, decoder=config.decoder is not None)
        files |= {"config.json": json.dumps(hf, indent=2) + "\n", "README.md": _card(model.assets)}
        storage.write_files(folder, files)
    return out


def stock_tensors(model: Model) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """The config without formats and sharing, and {the family's tensor name: float32 array} of a stock checkpoint."""
    model = merge_deltas(merge_bases(model))
    flat = tree.flatten(model.params)
    family = FAMILIES[model.config.family]
    check_stock(model.config)
    config = model.config.replace(formats=())
    if not family.shares:
        config = config.unshared()
    if not config.segments and "type_vocab_size" in family.write_config(config):
        config = config.replace(segments=1)  # stock code always adds a segment embedding: a row of zeros adds nothing
        flat["embedding/segment"] = np.zeros((1, config.table_width), np.float32)
    arrays = {address: np.asarray(materialize(node), np.float32) for address, node in flat.items()}
    # Under a head, transformers keeps the encoder's tensors below the family's name and the head's beside it.
    prefix = family.prefix(config.head) if config.head != "none" else ""
    names = Names()
    for address, where in family.names(config).items():
        names[address] = where if address.startswith("head/") else where._replace(name=prefix + where.name)
    own = {a: arrays[a if family.shares else stored_address(model.config, a)] for a in names}
    return config, write_tensors(names, own)


def check_stock(config: ModelConfig) -> None:
    """Raises ValueError for a structure that no stock class of the family has."""
    hint = "save the model instead: its folder runs in PyTorch too"
    if not isinstance(config.feed_forward_width, int):
        raise ValueError(
            f"export: stock {config.family} folders have one feed_forward_width, but this model's are "
            f"{list(config.feed_forward_width)}; {hint}"
        )
    family = FAMILIES[config.family]
    stock = family.read_config(family.write_config(config))
    pairs = [(config, stock, "")]
    if config.decoder is not None and stock.decoder is not None:
        pairs.append((config.decoder, stock.decoder, "decoder/"))
    for ours, theirs, prefix in pairs:
        for field in dataclasses.fields(ModelConfig):
            value, own = getattr(ours, field.name), getattr(theirs, field.name)
            if field.name not in _UNSAID and value != own:
                raise ValueError(
                    f"export: stock {config.family} folders have {prefix}{field.name} {own!r}, not {value!r}; {hint}"
                )


def stored_address(config: ModelConfig, address: str) -> str:
    """Where the weight that a layer uses is stored: "layers/<layer>/…" -> "layers/<weight set>/…"."""
    if (at := tree.place(address)) is None:
        return address
    sharing = config.decoder.sharing if at.stack and config.decoder else config.sharing
    return at._replace(number=getattr(sharing, at.part)[at.number]).address


def _card(assets: Assets) -> str:
    head = ["---", "library_name: transformers"]
    if assets.licence:
        head.append(f"license: {assets.licence}")
    if "/" in assets.source:
        head.append(f"base_model: {assets.source}")
    source = assets.source or "a model built from scratch"
    text = f"A dense float32 export, by flaxcompress, of a model made from {source}."
    licence = assets.licence or "the source states none; its terms apply to these weights"
    return "\n".join([*head, "---", "", text, "", f"Licence: {licence}.", ""])


# ── the check ────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_folder(model: Model, folder: str | Path, sentences: Sequence[str] | None = None) -> float | None:
    """Loads a saved or exported folder in PyTorch and compares its sentence vectors with the model's.

    Both sides compute in float32, on token ids from the model's tokenizer (random ids when it has none), pooled as the
    model's assets say. Nothing is downloaded, and no code is run from the folder: its modeling_flaxcompress.py must
    equal this version's, which is run in its place.

    Args:
      folder: what `save` or `export_dense` wrote for this model.
      sentences: texts to compare on; by default four of different lengths.

    Returns:
      The largest difference between two components, divided by the largest component where vectors are not normalised;
      None when torch or transformers is not installed.

    Raises:
      ValueError: the difference exceeds 1e-4 (2e-3 for a model that stores integers), or the folder's tensors or code
        are not what they should be.
    """
    folder = Path(folder)
    if any(util.find_spec(name) is None for name in ("torch", "transformers")):
        return None
    pooling = model.assets.pooling or Pooling()
    with jax.default_matmul_precision("highest"):
        if (patches := model.config.patches) is not None:  # images have no sentences: their hidden states are compared
            shape = (2, patches.channels, patches.height, patches.width)
            pixels = np.random.default_rng(0).normal(size=shape).astype(np.float32)
            want = np.asarray(run(model.params, model.config, jnp.float32, jnp.asarray(pixels)).last_hidden_state)
            got = _torch_states(folder, pixel_values=pixels)
        elif model.config.decoder is not None:
            ids, mask = _batch(model, sentences)
            limit = model.config.decoder.positions
            target = {"decoder_ids": jnp.asarray(ids[:, :limit]), "decoder_mask": jnp.asarray(mask[:, :limit])}
            out = run(model.params, model.config, jnp.float32, jnp.asarray(ids), jnp.asarray(mask), **target)
            want = np.asarray(out.last_hidden_state)[mask[:, :limit]]
            given = {"input_ids": ids.astype(np.int64), "attention_mask": mask.astype(np.int64)}
            given |= {f"decoder_{name}": array[:, :limit] for name, array in given.items()}
            got = _torch_states(folder, **given)[mask[:, :limit]]
        else:
            ids, mask = _batch(model, sentences)
            want = np.asarray(_sentence_vectors(model.params, ids, mask, model.config, jnp.float32, pooling))
            states = _torch_states(folder, input_ids=ids.astype(np.int64), attention_mask=mask.astype(np.int64))
            got = np.asarray(pool(jnp.asarray(states), jnp.asarray(mask), pooling))
    difference = float(np.abs(got - want).max())
    if not pooling.normalize:
        difference /= max(float(np.abs(want).max()), 1e-12)
    tolerance = _tolerance(model)
    if not difference <= tolerance:  # NaN is refused too
        raise ValueError(
            f"{folder}: PyTorch's sentence vectors differ from the model's by {difference:.2e}, more than the "
            f"{tolerance:.0e} that rounding explains; write the folder anew, and report it if that does not help"
        )
    return difference


_sentence_vectors = functools.partial(jax.jit, static_argnums=(3, 4, 5))(sentence_vectors)


def _tolerance(model: Model) -> float:
    integers = any(np.dtype(leaf.dtype).kind in "iu" for leaf in jax.tree.leaves(model.params))
    return INTEGER_TOLERANCE if integers else FLOAT_TOLERANCE


def _batch(model: Model, sentences: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray]:
    """ids and mask [B, T] of the sentences, or of random tokens when the model has no tokenizer."""
    if isinstance(sentences, str):
        sentences = [sentences]
    if model.assets.has_tokenizer:
        rows = model.assets.tokenize(SENTENCES if sentences is None else sentences).ids
    elif sentences is not None:
        raise ValueError("check_folder: sentences were given, but the model has no tokenizer; leave them out")
    else:
        limit, rng = model.config.positions, np.random.default_rng(0)
        lengths = sorted({1, min(5, limit), min(48, limit)})
        rows = [rng.integers(0, model.config.vocabulary, n).tolist() for n in lengths]
    if not rows:
        raise ValueError("check_folder: no sentences to compare on; give at least one")
    return pad_ids(rows, max(map(len, rows)), len(rows), model.config.pad_token)


def _torch_states(folder: Path, **inputs: np.ndarray) -> np.ndarray:
    """last_hidden_state [B, T, D] of the folder's model in PyTorch, on the CPU in float32."""
    import torch
    import transformers

    hf = storage.read_json(folder / "config.json")
    if hf.get("model_type") == MODEL_TYPE:
        check_code(folder)
        network = import_module(f"flaxcompress.export.{Path(NAME).stem}").FlaxCompressModel
    else:
        network = getattr(transformers, (hf.get("architectures") or ["AutoModel"])[0])
    with quiet_transformers():
        net, info = network.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    wrong = sorted(name for name in info["missing_keys"] if "pooler." not in name)
    wrong += sorted(name for name in info["unexpected_keys"] if "pooler." not in name)
    if wrong:
        raise ValueError(f"{folder}: tensors that {network.__name__} misses or does not know: {', '.join(wrong[:4])}")
    with torch.no_grad():
        given = {name: torch.tensor(array) for name, array in inputs.items()}
        if "decoder_input_ids" in given:  # not every class with a head keeps the stacks in a base model
            return net.eval()(**given, output_hidden_states=True).decoder_hidden_states[-1].numpy()
        return net.eval().base_model(**given).last_hidden_state.numpy()
