"""Tokenizers from the files of a checkpoint, by the library `tokenizers`."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

from flaxcompress.sentence_piece import marian_tokenizer, t5_tokenizer


def make_tokenizer(files: Sequence[tuple[str, bytes]], max_length: int):
    """The `tokenizers.Tokenizer` of these files; truncation and padding embedded in tokenizer.json are ignored.

    Without it, vocab.json and merges.txt are read as GPT-2's BPE of bytes, vocab.json and source.spm as Marian's,
    spiece.model as T5's, and vocab.txt as BERT's WordPiece, lower-casing as tokenizer_config.json says (default true).
    """
    import tokenizers

    content = dict(files)
    if "tokenizer.json" in content:
        try:
            tokenizer = tokenizers.Tokenizer.from_str(content["tokenizer.json"].decode("utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"tokenizer.json cannot be read: {error}") from None
    elif "vocab.txt" in content:
        tokenizer = _word_piece(content)
    elif "merges.txt" in content and "vocab.json" in content:
        tokenizer = _byte_level_bpe(content)
    elif "source.spm" in content and "vocab.json" in content:
        tokenizer = marian_tokenizer(content)
    elif "spiece.model" in content:
        tokenizer = t5_tokenizer(content)
    else:
        raise ValueError(
            "the checkpoint has no tokenizer: put tokenizer.json beside its config.json, or vocab.txt (BERT), "
            "vocab.json and merges.txt (GPT-2), vocab.json and source.spm (Marian), or spiece.model (T5)"
        )
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


def _word_piece(content: dict[str, bytes]):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = {line: i for i, line in enumerate(vocabulary_lines(content["vocab.txt"]))}
    options = read_options(content.get("tokenizer_config.json"))
    unknown, cls, sep = (
        _token(options.get(name), default)
        for name, default in (("unk_token", "[UNK]"), ("cls_token", "[CLS]"), ("sep_token", "[SEP]"))
    )
    for token in (unknown, cls, sep):
        if token not in vocabulary:
            raise ValueError(f"vocab.txt has no {token!r} among its {len(vocabulary)} entries: not a BERT vocabulary?")
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=options.get("do_lower_case", True),
        strip_accents=options.get("strip_accents"),
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing((sep, vocabulary[sep]), (cls, vocabulary[cls]))
    special = {_token(options.get(f"{n}_token"), f"[{n.upper()}]") for n in ("unk", "cls", "sep", "pad", "mask")}
    tokenizer.add_special_tokens(sorted(special & set(vocabulary)))
    return tokenizer


def vocabulary_lines(content: bytes) -> list[str]:
    """The tokens of a vocab.txt in id order; only \n, \r\n and \r end a line, as tokens may hold rarer separators."""
    try:
        text = io.TextIOWrapper(io.BytesIO(content), "utf-8").read()
    except UnicodeDecodeError as error:
        raise ValueError(f"vocab.txt: not UTF-8 at byte {error.start}: the file is damaged") from None
    return text.removesuffix("\n").split("\n")


def read_options(content: bytes | None) -> dict[str, Any]:
    """tokenizer_config.json as an object."""
    try:
        options = json.loads(content or b"{}")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"tokenizer_config.json: not valid JSON ({error})") from None
    if not isinstance(options, dict):
        raise ValueError(f"tokenizer_config.json: expected an object, got {type(options).__name__}")
    return options


def _token(value: Any, default: str) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value or default


def _byte_level_bpe(content: dict[str, bytes]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    try:
        vocabulary = json.loads(content["vocab.json"])
        lines = content["merges.txt"].decode("utf-8").split("\n")
        merges: Any = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"vocab.json and merges.txt cannot be read: {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t in ("<|endoftext|>",) if t in vocabulary]
    tokenizer.add_special_tokens(special)
    return tokenizer


def sentence_piece_bpe(pieces: Sequence[tuple[str, float]]) -> str:
    """tokenizer.json of a SentencePiece BPE model from its (piece, score) in id order; <s> is put before every text.

    A merge exists wherever two pieces together are one, the better the score the earlier; bytes <0x00> … <0xFF>, where
    the vocabulary has them, spell what it lacks. Without them runs of white space count as one blank.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors

    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    spelled = "<0x00>" in ids
    merges = []
    for piece, score in pieces:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((-score, ids[left], ids[right], left, right))
    ordered = [(left, right) for *_, left, right in sorted(merges)]
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=ordered, unk_token="<unk>", fuse_unk=not spelled, byte_fallback=spelled)
    )
    steps: list = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    if not spelled:
        steps = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), *steps]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    tokenizer.add_special_tokens([t for t in ("<unk>", "<s>", "</s>") if t in ids])
    return tokenizer.to_str()
