"""SentencePiece models (Kudo & Richardson 2018) as tokenizers of the library `tokenizers`; .model and .spm files.

The files are protocol buffers; the few fields that matter are read here, so that no other library is needed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

UNIGRAM = 1  # model_type of a file's trainer_spec; 2 is BPE
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # a piece's type
_NEVER = -1e6  # a score that no path through a text with other pieces falls to


class PieceModel(NamedTuple):
    """A SentencePiece model.

    Attributes:
      pieces: (text, score, type) in id order.
      kind: 1 for Unigram, 2 for BPE.
      character_map: how characters are normalised, as the library's Precompiled wants it; b"" for not at all.
      extra_white_space: whether blanks at the ends, and several in a row, are kept.
    """

    pieces: list[tuple[str, float, int]]
    kind: int
    character_map: bytes
    extra_white_space: bool


def read_pieces(content: bytes, where: str) -> PieceModel:
    """Reads a .model or .spm file. Raises ValueError where it is damaged."""
    pieces, kind, character_map, keeps = [], UNIGRAM, b"", False
    try:
        for field, value in _fields(content):
            if field == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
                pieces.append((piece[1].decode("utf-8"), score, piece.get(3, _NORMAL)))
            elif field == 2:
                kind = dict(_fields(value)).get(3, UNIGRAM)
            elif field == 3:
                options = dict(_fields(value))
                character_map, keeps = options.get(2, b""), not options.get(4, 1)
    except (IndexError, KeyError, ValueError, struct.error, AttributeError, TypeError) as error:
        raise ValueError(f"{where}: damaged or not a SentencePiece model ({type(error).__name__}: {error})") from None
    if not pieces:
        raise ValueError(f"{where}: not a SentencePiece model: it has no pieces")
    return PieceModel(pieces, kind, character_map, keeps)


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a message's fields: an integer, or the bytes of anything else."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(content, place)
        else:
            size, place = _varint(content, place) if kind == 2 else ({1: 8, 5: 4}[kind], place)
            value, place = content[place : place + size], place + size
            if place > len(content):
                raise ValueError("it ends within a field")
        yield key >> 3, value


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place


def unigram_tokenizer(model: PieceModel, vocabulary: Sequence[str], *, end: str, unknown: str = "<unk>"):
    """A `tokenizers.Tokenizer` of a Unigram model (Kudo 2018), with ids of its own.

    Args:
      vocabulary: the tokens in id order; those that the model does not have are never found in a text, except special
        ones as they stand.
      end: the token that ends every text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    scores = {piece: score for piece, score, kind in model.pieces if kind in (_NORMAL, _USER_DEFINED)}
    listed = [(token, scores.get(token, _NEVER)) for token in vocabulary]
    tokenizer = Tokenizer(models.Unigram(listed, unk_id=list(vocabulary).index(unknown), byte_fallback=False))
    steps: list[Any] = [normalizers.Precompiled(model.character_map)] if model.character_map else []
    if not model.extra_white_space:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, list(vocabulary).index(end))]
    )
    return tokenizer


def marian_tokenizer(content: Mapping[str, bytes]):
    """The tokenizer of an OPUS-MT translator: source.spm cuts texts, vocab.json has the ids, of both languages.

    A text may begin with a code such as >>fra<<, where the vocabulary has it: the language to translate to. Of
    characters that the source's model does not know, those that the target's knows stand alone; SentencePiece puts
    neighbours together as one unknown token.
    """
    model = read_pieces(content["source.spm"], "source.spm")
    if model.kind != UNIGRAM:
        raise ValueError("source.spm: only Unigram models are supported")
    ids = _ids(content["vocab.json"])
    tokenizer = unigram_tokenizer(model, ids, end="</s>")
    codes = [token for token in ids if token.startswith(">>") and token.endswith("<<")]
    tokenizer.add_special_tokens([t for t in ("</s>", "<unk>", "<pad>", *codes) if t in ids])
    return tokenizer


def _ids(content: bytes) -> list[str]:
    """vocab.json's tokens in id order. Raises ValueError where ids are missing, or special tokens."""
    try:
        ids = json.loads(content)
        ordered = sorted(ids, key=ids.__getitem__)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError, LookupError) as error:
        raise ValueError(f"vocab.json: not an object of tokens and their ids ({error})") from None
    if [ids[token] for token in ordered] != list(range(len(ordered))):
        raise ValueError(f"vocab.json: its {len(ordered)} ids are not 0 … {len(ordered) - 1}")
    if missing := [token for token in ("</s>", "<unk>") if token not in ids]:
        raise ValueError(f"vocab.json: has no {missing[0]!r}")
    return ordered


def t5_tokenizer(content: Mapping[str, bytes]):
    """The tokenizer of T5 from spiece.model: its pieces, then <extra_id_99> … <extra_id_0>."""
    model = read_pieces(content["spiece.model"], "spiece.model")
    extra = json.loads(content.get("tokenizer_config.json", b"{}")).get("extra_ids", 100)
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(extra))]
    vocabulary = [*(piece for piece, _, _ in model.pieces), *sentinels]
    tokenizer = unigram_tokenizer(model, vocabulary, end="</s>")
    special = [piece for piece, _, kind in model.pieces if kind in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([*special, *sentinels])
    return tokenizer
