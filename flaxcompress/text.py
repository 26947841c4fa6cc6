"""Assets: the tokenizer, the pooling and the length limit that belong to a checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxcompress.config import closest
from flaxcompress.tokenizer import make_tokenizer, read_options, vocabulary_lines

LEXICON = "lexicon.json"  # terms and their feature ids
PIXELS = "preprocessor_config.json"  # how images become numbers
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "source.spm",
    "target.spm",
    "spiece.model",
    "added_tokens.json",
    "chat_template.jinja",
    LEXICON,
    PIXELS,
)
_ONE_OF = ("tokenizer.json", "vocab.txt", "merges.txt", "source.spm", "spiece.model")  # has a tokenizer
POOLING_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How token vectors become a sentence vector: "mean", "cls" or "max", then unit length if `normalize`."""

    mode: str = "mean"
    normalize: bool = False

    def __post_init__(self):
        if self.mode not in POOLING_MODES.values():
            raise ValueError(f"pooling: unknown mode {self.mode!r}; {closest(self.mode, POOLING_MODES.values())}")


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Token ids of some texts, special tokens included, and how many texts were cut at the limit."""

    ids: list[list[int]]
    truncated: int


@dataclasses.dataclass(frozen=True, eq=False)
class Assets:
    """What a checkpoint carries besides weights. Equal, and hashed, by content, so that jit does not retrace.

    Attributes:
      files: (name, bytes) of the tokenizer's files, copied into every saved folder.
      pooling: from sentence-transformers' modules.json; None where the source had none (`encode` then takes the mean).
      max_length: tokens per text, special tokens included.
      source: where the checkpoint came from, for the model card.
      licence: the source's licence, for the model card.
      end_tokens: ids that end a generated text.
      start_token: the id that a decoder beside an encoder begins with; None for padding's.
      never_tokens: ids that are never generated.
      classes: the names of a classifier's classes, in order; none where they have only numbers.
    """

    files: tuple[tuple[str, bytes], ...] = ()
    pooling: Pooling | None = None
    max_length: int = 512
    source: str = ""
    licence: str = ""
    end_tokens: tuple[int, ...] = ()
    start_token: int | None = None
    never_tokens: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of the content."""
        head = [
            self.pooling and dataclasses.astuple(self.pooling),
            self.max_length,
            self.source,
            self.licence,
            self.end_tokens,
            self.start_token,
            self.never_tokens,
            self.classes,
        ]
        digest = hashlib.sha256(json.dumps(head).encode())
        for name, content in self.files:
            digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Assets) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def file(self, name: str) -> bytes | None:
        """The content of one tokenizer file, or None."""
        return dict(self.files).get(name)

    @property
    def has_tokenizer(self) -> bool:
        """Whether texts can be tokenized at all."""
        return any(self.file(name) is not None for name in _ONE_OF)

    @property
    def chat_template(self) -> str | None:
        """The Jinja template by which messages become one text, or None."""
        if (content := self.file("chat_template.jinja")) is not None:
            return content.decode("utf-8")
        stated = read_options(self.file("tokenizer_config.json")).get("chat_template")
        return stated if isinstance(stated, str) else None

    @property
    def special_tokens(self) -> dict[str, str]:
        """{"bos_token": "<s>", …} as tokenizer_config.json states them."""
        options = read_options(self.file("tokenizer_config.json"))
        names = (f"{n}_token" for n in ("bos", "eos", "pad", "unk", "cls", "sep", "mask"))
        stated = {name: options.get(name) for name in names}
        stated = {n: v.get("content") if isinstance(v, dict) else v for n, v in stated.items()}
        return {n: v for n, v in stated.items() if isinstance(v, str)}

    def tokenize_parts(self, text: str) -> list[int]:
        """Token ids of a text that holds its special tokens already: none is put around it."""
        return _live_tokenizer(self).encode(text, add_special_tokens=False).ids

    def detokenize(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The texts that token ids stand for, special tokens left out."""
        return _live_tokenizer(self).decode_batch([list(row) for row in rows])

    def tokenize(self, texts: Sequence[str]) -> TokenBatch:
        """Token ids of `texts`, cut at `max_length`.

        Raises ValueError when the checkpoint has no tokenizer, TypeError when a text is not a string.
        """
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"text {number} is {type(text).__name__}, not a string: {text!r:.80}")
        tokenizer = _live_tokenizer(self)
        try:
            encodings = tokenizer.encode_batch_fast(list(texts))
        except (UnicodeEncodeError, TypeError):
            bad = next(n for n, text in enumerate(texts) if text.encode("utf-8", "replace") != _encoded(text))
            raise ValueError(f"text {bad} is not valid Unicode: {texts[bad]!r:.80}") from None
        # The tokenizer cannot cut below its special tokens; cut what it leaves over.
        cut = [bool(e.overflowing) or len(e.ids) > self.max_length for e in encodings]
        return TokenBatch([e.ids[: self.max_length] for e in encodings], sum(cut))


def _encoded(text: str) -> bytes | None:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return None


@functools.lru_cache(maxsize=8)
def _live_tokenizer(assets: Assets):
    return make_tokenizer(assets.files, assets.max_length)


def first_ordinary_token(assets: Assets) -> int:
    """The id after the leading block of special and unused entries ("[PAD]", "[unused7]", "<s>"); 0 if unknown."""
    content = assets.file("tokenizer.json")
    if content is not None:
        model = json.loads(content).get("model", {})
        vocabulary = model.get("vocab", {})
        names = {i: t for t, i in vocabulary.items()} if isinstance(vocabulary, dict) else {}
    else:
        names = dict(enumerate(vocabulary_lines(assets.file("vocab.txt") or b"")))
    start = 0
    while re.fullmatch(r"\[.+\]|<.+>", names.get(start, "")):
        start += 1
    return start


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def _object(path: Path) -> dict[str, Any]:
    content = _json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def read_pooling(folder: Path) -> Pooling | None:
    """sentence-transformers' modules.json and the pooling folder it names; None when there is no modules.json."""
    modules = folder / "modules.json"
    if not modules.is_file():
        return None
    mode, normalize = "mean", False
    listed = _json(modules)
    if not isinstance(listed, list) or not all(isinstance(module, dict) for module in listed):
        raise ValueError(f"{modules}: expected a list of objects, one for each module")
    for module in listed:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Transformer":
            continue
        if kind == "Normalize":  # its folder may be absent: it holds nothing
            normalize = True
        elif kind == "Pooling":
            path = folder / str(module.get("path", "")) / "config.json"
            if not path.is_file():
                raise FileNotFoundError(f"{path}: modules.json names it, but it does not exist")
            mode = _pooling_mode(path)
        else:
            raise ValueError(f"{modules}: module {kind!r} is not supported; known: Transformer, Pooling, Normalize")
    return Pooling(mode, normalize)


def _pooling_mode(path: Path) -> str:
    options = _object(path)
    if isinstance(options.get("pooling_mode"), str):
        chosen = [options["pooling_mode"]]
    else:
        chosen = [k for k, v in options.items() if k.startswith("pooling_mode_") and v]
    modes = [POOLING_MODES.get(c, c) for c in chosen]
    if len(modes) != 1 or modes[0] not in POOLING_MODES.values():
        raise ValueError(f"{path}: pooling {chosen} is not supported; one of {', '.join(POOLING_MODES)} must be set")
    return str(modes[0])


def read_assets(folder: Path, *, positions: int, source: str) -> Assets:
    """The assets of a Hugging Face (or sentence-transformers) folder.

    The length limit is `max_seq_length` of sentence_bert_config.json, else the number of positions.
    """
    files = tuple((n, (folder / n).read_bytes()) for n in TOKENIZER_FILES if (folder / n).is_file())
    limit = positions
    sentence_config = folder / "sentence_bert_config.json"
    if sentence_config.is_file():
        given = _object(sentence_config).get("max_seq_length")
        if given is not None and (not isinstance(given, int) or given < 1):
            raise ValueError(f"{sentence_config}: max_seq_length must be a positive integer, got {given!r}")
        limit = min(given or positions, positions)
    return Assets(
        files=files,
        pooling=read_pooling(folder),
        max_length=limit,
        source=source,
        licence=_licence(folder),
        classes=_classes(folder),
        **_generation(folder),
    )


def _classes(folder: Path) -> tuple[str, ...]:
    """config.json's id2label in order; nothing where that only numbers them, or calls two alike."""
    path = folder / "config.json"
    stated = _object(path).get("id2label") if path.is_file() else None
    numbered = {str(i) for i in range(len(stated))} if isinstance(stated, dict) else set()
    if not isinstance(stated, dict) or set(stated) != numbered:
        return ()
    names = tuple(str(stated[str(i)]) for i in range(len(stated)))
    plain = all(re.fullmatch(r"LABEL_\d+", name) for name in names)
    return () if plain or len(set(names)) < len(names) else names


def class_names(assets: Assets, count: int) -> dict[str, Any]:
    """id2label and label2id of config.json, where the assets name so many classes."""
    if not count or len(assets.classes) != count:
        return {}
    return {"id2label": dict(enumerate(assets.classes)), "label2id": {n: i for i, n in enumerate(assets.classes)}}


def _generation(folder: Path) -> dict[str, Any]:
    """What generation_config.json, or config.json, says about the tokens that begin and end a text, or never come."""
    end = _stated_ids(folder, "eos_token_id")
    start = _stated_ids(folder, "decoder_start_token_id")
    never = _stated_ids(folder, "bad_words_ids")  # of which only single tokens are tokens that never come
    return {"end_tokens": end, "start_token": start[0] if start else None, "never_tokens": never}


def generation_config_file(assets: Assets, pad_token: int, *, decoder: bool) -> dict[str, str]:
    """generation_config.json of a model that generates, where transformers looks for such ids."""
    found: dict[str, Any] = {"pad_token_id": pad_token}
    if assets.end_tokens:
        found["eos_token_id"] = list(assets.end_tokens)
    if assets.never_tokens:
        found["bad_words_ids"] = [[token] for token in assets.never_tokens]
    if decoder:
        found["decoder_start_token_id"] = pad_token if assets.start_token is None else assets.start_token
    return {"generation_config.json": json.dumps(found, indent=2) + "\n"}


def _stated_ids(folder: Path, key: str) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file() and (stated := _object(folder / name).get(key)) is not None:
            ids = stated if isinstance(stated, list) else [stated]
            if key == "bad_words_ids":
                ids = [word[0] for word in ids if isinstance(word, list) and len(word) == 1]
            if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
                raise ValueError(f"{folder / name}: {key} must be one id or a list of ids, got {stated!r}")
            return tuple(ids)
    return ()


def _licence(folder: Path) -> str:
    card = folder / "README.md"
    if not card.is_file():
        return ""
    lines = card.read_text("utf-8", "replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return ""
    for line in lines[1:]:
        if line.strip() == "---":
            break
        if line.startswith("license:"):
            return line.split(":", 1)[1].strip()
    return ""


def tokenizer_config_file(assets: Assets) -> dict[str, str]:
    """{"tokenizer_config.json": text}: the class and length limit that transformers reads; empty without tokenizer."""
    if not assets.has_tokenizer:
        return {}
    options = read_options(assets.file("tokenizer_config.json"))
    options.setdefault("tokenizer_class", "BertTokenizer")
    options["model_max_length"] = assets.max_length
    return {"tokenizer_config.json": json.dumps(options, indent=2)}


def sentence_transformers_files(assets: Assets, width: int) -> dict[str, str]:
    """{path: text} of modules.json and what it names, for a saved folder; empty when the source had no pooling."""
    if assets.pooling is None:
        return {}
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if assets.pooling.normalize:
        kinds.append(("2_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    options = {"word_embedding_dimension": width}
    options |= {key: mode == assets.pooling.mode for key, mode in POOLING_MODES.items()}
    return {
        "modules.json": json.dumps(modules, indent=2),
        "1_Pooling/config.json": json.dumps(options, indent=2),
        "sentence_bert_config.json": json.dumps({"max_seq_length": assets.max_length, "do_lower_case": False}),
    }


def pad_ids(rows: Sequence[Sequence[int]], length: int, count: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """ids [count, length] int32 and mask [count, length] bool; rows beyond the given ones are all padding."""
    ids = np.full((count, length), pad, np.int32)
    mask = np.zeros((count, length), bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return ids, mask
