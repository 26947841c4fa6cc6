"""A tokenizer with fewer tokens: which ones it cannot do without, and its files without the others.

Fewer tokens must not change how a text is cut that needs none of the others. WordPiece takes the longest token that
fits, Unigram the best path: the ones that a text was cut into before remain what they were among fewer. BPE merges step
by step, so that the steps towards every kept token are kept as well. What is left to chance (a word that was unknown,
since a longer token led astray) `trimmed` checks, text by text.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flaxcompress.text import Assets
from flaxcompress.tokenizer import make_tokenizer, vocabulary_lines

_CHUNK = 4096
_PIECES = ("source.spm", "spiece.model")
_KINDS = ("WordPiece", "BPE", "Unigram", "WordLevel")

Files = tuple[tuple[str, bytes], ...]


def whole_tokenizer(files: Files) -> Any:
    """The `tokenizers.Tokenizer` of a checkpoint's files that cuts no text off."""
    tokenizer = make_tokenizer(files, 1)
    tokenizer.no_truncation()
    return tokenizer


def used_ids(assets: Assets, texts: Sequence[str]) -> set[int]:
    """The ids of all tokens, special ones included, that `texts` are cut into."""
    tokenizer, found = whole_tokenizer(assets.files), set()
    for part in _parts(texts):
        found.update(i for encoding in tokenizer.encode_batch(part) for i in encoding.ids)
    return found


def trimmed(assets: Assets, texts: Sequence[str], ids: Iterable[int] = ()) -> tuple[list[int], Files]:
    """(old id of every new one, ascending; the tokenizer's files) with what `texts` need, and the tokens `ids`.

    All texts are cut into the same tokens as before. Raises ValueError for a tokenizer of an unknown kind.
    """
    before = whole_tokenizer(assets.files)
    data = json.loads(before.to_str())
    kept = needed(data, {*ids, *used_ids(assets, texts)})
    while True:
        files = without_others(assets.files, data, kept)
        astray = differing(before, whole_tokenizer(files), texts)
        more = needed(data, kept | fitting(data, before, astray)) if astray else kept
        if more == kept:
            break
        kept = more
    if astray:
        raise ValueError(
            f"TrimVocabulary: {astray[0]!r:.80} would be cut into other tokens; the tokenizer is not trimmed"
        )
    return sorted(kept), files


def differing(before: Any, after: Any, texts: Sequence[str]) -> list[str]:
    """The texts that two tokenizers cut into different tokens."""
    found = []
    for part in _parts(texts):
        pairs = zip(part, before.encode_batch(part), after.encode_batch(part), strict=True)
        found += [text for text, a, b in pairs if a.tokens != b.tokens]
    return found


def _parts(texts: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(texts), _CHUNK):
        yield list(texts[start : start + _CHUNK])


def fitting(data: Mapping[str, Any], tokenizer: Any, texts: Sequence[str]) -> set[int]:
    """The ids of all tokens that occur anywhere in `texts`: with them, no cut can be another."""
    words = set()
    for text in texts:
        plain = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
        cut = [(plain, None)] if tokenizer.pre_tokenizer is None else tokenizer.pre_tokenizer.pre_tokenize_str(plain)
        words.update(word for word, _ in cut)
    marks = [data["model"].get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix")]
    body = lambda token: token.removeprefix(marks[0]).removesuffix(marks[1])  # noqa: E731
    by_body: dict[str, list[int]] = {}
    for token, number in _vocabulary(data["model"]).items():
        by_body.setdefault(body(token), []).append(number)
    longest = max(map(len, by_body))
    parts = {w[i : i + n] for w in words for i in range(len(w)) for n in range(1, min(longest, len(w) - i) + 1)}
    return {number for part in parts for number in by_body.get(part, ())}


# ── what must stay ───────────────────────────────────────────────────────────────────────────────────────────────────


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    """{token: id} of a tokenizer's model, without added tokens."""
    if model["type"] not in _KINDS:
        raise ValueError(f"TrimVocabulary: a {model['type']} tokenizer is not supported, only {', '.join(_KINDS)}")
    if model["type"] == "Unigram":
        return {piece: i for i, (piece, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def needed(data: Mapping[str, Any], ids: set[int]) -> set[int]:
    """`ids` and what the tokenizer needs to stay valid: special tokens, characters, bytes, steps of merges."""
    model = data["model"]
    vocabulary = _vocabulary(model)
    added = {token["id"] for token in data["added_tokens"]}
    kept = {*ids, *added, *(i for _, i in _special(data["post_processor"]))}
    marks = [model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix")]
    for token, number in vocabulary.items():
        single = len(token.removeprefix(marks[0]).removesuffix(marks[1])) <= 1
        if single or (token.startswith("<0x") and len(token) == 6) or token == model.get("unk_token"):
            kept.add(number)
    if model["type"] == "Unigram":
        if model.get("unk_id") is not None:
            kept.add(model["unk_id"])
        scores = [score for _, score in model["vocab"]]
        kept.add(scores.index(min(scores)))  # the score of what is unknown follows from it
    if model["type"] == "BPE":
        names = {number: token for token, number in vocabulary.items()}
        ranks = {tuple(pair): rank for rank, pair in enumerate(_merges(model))}
        steps = (_steps(names[i], ranks, *marks) for i in sorted(kept - added) if i in names)
        kept |= {vocabulary[token] for tokens in steps for token in tokens if token in vocabulary}
    return kept


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return [(left, right) for left, right in pairs]


def _joined(left: str, right: str, prefix: str) -> str:
    return left + right.removeprefix(prefix)


def _steps(token: str, ranks: Mapping[tuple[str, ...], int], prefix: str, suffix: str) -> Iterator[str]:
    """Every token that byte-pair encoding goes through on the way to `token`."""
    inside, first = token.removesuffix(suffix), prefix if prefix and token.startswith(prefix) else ""
    parts = [first + c if i == 0 else prefix + c for i, c in enumerate(inside.removeprefix(first))]
    if parts and suffix and token.endswith(suffix):
        parts[-1] += suffix
    while len(parts) > 1:
        rank, at = min((ranks.get((a, b), len(ranks)), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
        if rank == len(ranks):
            return
        parts[at : at + 2] = [_joined(parts[at], parts[at + 1], prefix)]
        yield parts[at]


# ── the files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _special(processor: Any) -> Iterator[tuple[str, int]]:
    """(token, id) of what a post-processor puts around texts."""
    if processor is None:
        return
    for inner in processor.get("processors", ()):
        yield from _special(inner)
    for name in ("sep", "cls"):
        if isinstance(processor.get(name), list):
            yield tuple(processor[name])
    special = processor.get("special_tokens")
    for entry in special.values() if isinstance(special, dict) else ():
        yield from zip(entry["tokens"], entry["ids"], strict=True)


def _renumbered(processor: Any, new: Mapping[int, int]) -> Any:
    """A post-processor with new ids."""
    if processor is None:
        return None
    out = dict(processor)
    if "processors" in out:
        out["processors"] = [_renumbered(inner, new) for inner in out["processors"]]
    for name in ("sep", "cls"):
        if isinstance(out.get(name), list):
            out[name] = [out[name][0], new[out[name][1]]]
    if isinstance(out.get("special_tokens"), dict):
        entries = out["special_tokens"].items()
        out["special_tokens"] = {name: {**entry, "ids": [new[i] for i in entry["ids"]]} for name, entry in entries}
    return out


def without_others(files: Files, data: Mapping[str, Any], kept: set[int]) -> Files:
    """The files with the tokens `kept` alone, numbered anew in their order; `data` is the whole tokenizer.json."""
    new = {old: number for number, old in enumerate(sorted(kept))}
    model = dict(data["model"])
    vocabulary = {token: new[i] for token, i in _vocabulary(model).items() if i in new}
    if model["type"] == "Unigram":
        # ids are places in the list: what is kept beyond it (added tokens) must stay beyond it, as sorting ensures
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new]
        model["unk_id"] = None if model.get("unk_id") is None else new[model["unk_id"]]
    else:
        model["vocab"] = vocabulary
    if model["type"] == "BPE":
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = [(a, b) for a, b in _merges(model) if {a, b, _joined(a, b, prefix)} <= vocabulary.keys()]
        model["merges"] = [list(pair) for pair in pairs]
    added = [{**token, "id": new[token["id"]]} for token in data["added_tokens"]]
    whole = {**data, "model": model, "added_tokens": added}
    whole["post_processor"] = _renumbered(data["post_processor"], new)
    if any(name in _PIECES for name, _ in files):  # whose ids follow from the file: tokenizer.json takes their place
        return _instead_of_pieces(files, whole)
    out = []
    for name, content in files:
        if name == "tokenizer.json":
            stated = json.loads(content)  # what the live tokenizer was told to do without
            more = {key: stated.get(key) for key in ("truncation", "padding")}
            if more["padding"] is not None:
                more["padding"] = {**more["padding"], "pad_id": new.get(more["padding"]["pad_id"], 0)}
            content = json.dumps({**whole, **more}, ensure_ascii=False).encode()
        elif name == "vocab.txt":
            lines = vocabulary_lines(content)
            content = "\n".join(line for i, line in enumerate(lines) if i in new).encode() + b"\n"
        elif name == "vocab.json":
            content = json.dumps(vocabulary, ensure_ascii=False).encode()
        elif name == "merges.txt":
            content = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]).encode() + b"\n"
        elif name == "added_tokens.json":
            content = json.dumps({t: new[i] for t, i in json.loads(content).items() if i in new}).encode()
        elif name == "tokenizer_config.json":
            content = _options(content, new)
        out.append((name, content))
    return tuple(out)


def _instead_of_pieces(files: Files, whole: Mapping[str, Any]) -> Files:
    """tokenizer.json in place of SentencePiece files, and a tokenizer_config.json that makes transformers read it."""
    options = {key: value for key, value in _object_of(files, "tokenizer_config.json").items() if "_token" in key}
    options.pop("added_tokens_decoder", None)
    known = {token["content"] for token in whole["added_tokens"]}
    common = (("eos_token", "</s>"), ("unk_token", "<unk>"), ("pad_token", "<pad>"))
    options = {**{key: token for key, token in common if token in known}, **options}
    options["tokenizer_class"] = "PreTrainedTokenizerFast"
    gone = {*_PIECES, "target.spm", "vocab.json", "tokenizer_config.json", "added_tokens.json"}
    kept = tuple((name, content) for name, content in files if name not in gone)
    made = {"tokenizer.json": whole, "tokenizer_config.json": options}
    return (*kept, *((name, json.dumps(data, ensure_ascii=False).encode()) for name, data in made.items()))


def _object_of(files: Files, name: str) -> dict[str, Any]:
    return json.loads(dict(files).get(name, b"{}"))


def _options(content: bytes, new: Mapping[int, int]) -> bytes:
    """tokenizer_config.json, whose added tokens stand under their ids."""
    options = json.loads(content)
    stated = options.get("added_tokens_decoder")
    if stated is None:
        return content
    options["added_tokens_decoder"] = {str(new[int(i)]): token for i, token in stated.items() if int(i) in new}
    return json.dumps(options, indent=2).encode()
