"""Checkpoints of llama2.c (Karpathy 2023): one flat file of float32 arrays, its tokenizer beside it.

Seven int32 (width, feed-forward width, layers, heads, key/value heads, ± vocabulary, positions), then the arrays. They
are read as a Llama model. Rotary positions turn neighbours (x_2i, x_2i+1) there and (x_i, x_i+d/2) here, so the rows of
query and key kernels change places.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxcompress.config import ModelConfig, Rotary
from flaxcompress.families.base import Checkpoint
from flaxcompress.text import Assets
from flaxcompress.tokenizer import sentence_piece_bpe

_HEADER = struct.Struct("<7i")
_BEGIN, _END = 1, 2


class _Header(NamedTuple):
    width: int
    inner: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    positions: int
    tied: bool

    @property
    def arrays(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every array in the file, kernels as [out, in]."""
        d, inner, n = self.width, self.inner, self.layers
        shared = d // self.heads * self.groups
        yield "embedding", (self.vocabulary, d)
        yield "norms/attention", (n, d)
        yield "attention/query", (n, d, d)
        yield "attention/key", (n, shared, d)
        yield "attention/value", (n, shared, d)
        yield "attention/output", (n, d, d)
        yield "norms/feed_forward", (n, d)
        yield "feed_forward/gate", (n, inner, d)
        yield "feed_forward/down", (n, d, inner)
        yield "feed_forward/up", (n, inner, d)
        yield "final_norm", (d,)
        yield "rotary", (2, self.positions, d // self.heads // 2)
        if not self.tied:
            yield "head", (self.vocabulary, d)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return _HEADER.size + 4 * sum(int(np.prod(shape)) for _, shape in self.arrays)


def find_checkpoint(path: Path) -> Path | None:
    """The llama2.c checkpoint that `path` is, or the only one in the folder without config.json that it is."""
    if path.is_file():
        return path if _header(path) is not None else None
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = [file for file in sorted(path.glob("*.bin")) if _header(file) is not None]
    if len(found) > 1:
        raise ValueError(
            f"{path}: holds {len(found)} llama2.c checkpoints; name one: {', '.join(f.name for f in found)}"
        )
    return found[0] if found else None


def _header(file: Path) -> _Header | None:
    with file.open("rb") as stream:
        content = stream.read(_HEADER.size)
    if len(content) < _HEADER.size:
        return None
    width, inner, layers, heads, groups, vocabulary, positions = _HEADER.unpack(content)
    if min(width, inner, layers, heads, groups, abs(vocabulary), positions) < 1 or max(width, inner, layers) > 2**20:
        return None
    if width % heads or heads % groups or width // heads % 2:
        return None
    header = _Header(width, inner, layers, heads, groups, abs(vocabulary), positions, vocabulary > 0)
    return header if header.size == file.stat().st_size else None


def read_checkpoint(file: Path) -> tuple[ModelConfig, dict[str, np.ndarray], Assets]:
    """(config, {address: float32 array}, assets) of a checkpoint that `find_checkpoint` found."""
    header = _header(file)
    assert header is not None
    config = ModelConfig(
        family="llama",
        vocabulary=header.vocabulary,
        width=header.width,
        layers=header.layers,
        heads=header.heads,
        key_value_heads=header.groups,
        head_width=header.width // header.heads,
        feed_forward_width=header.inner,
        positions=header.positions,
        segments=0,
        activation="silu",
        norm_epsilon=1e-5,
        dropout=0.0,
        attention_dropout=0.0,
        pooler=False,
        position_embedding="none",
        embedding_norm=False,
        rotary=Rotary(),
        causal=True,
        gated=True,
        norm="rms",
        norm_place="pre",
        final_norm=True,
        attention_bias=False,
        output_bias=False,
        feed_forward_bias=False,
        head="causal_lm",
        tied=header.tied,
    )
    values, offset, flat = np.fromfile(file, "<f4", offset=_HEADER.size), 0, {}
    for name, shape in header.arrays:
        size = int(np.prod(shape))
        array = values[offset : offset + size].reshape(shape)
        offset += size
        if name == "embedding":
            flat["embedding/token"] = array
        elif name == "final_norm":
            flat["final_norm/scale"] = array
        elif name == "head":
            flat["head/output/kernel"] = array.T
        elif name.startswith("norms/"):
            flat.update({f"layers/{i}/{name}/scale": row for i, row in enumerate(array)})
        elif name != "rotary":
            turned = name in ("attention/query", "attention/key")
            for i, kernel in enumerate(array):
                kernel = _halves(kernel, config.head_dim) if turned else kernel
                flat[f"layers/{i}/{name}/kernel"] = np.ascontiguousarray(kernel.T)
    return config, flat, _assets(file, config)


def _halves(kernel: np.ndarray, width: int) -> np.ndarray:
    """[out, in] with every head's rows 0, 1, 2, 3, … in the order 0, 2, …, 1, 3, …"""
    heads = kernel.reshape(-1, width // 2, 2, kernel.shape[1])
    return heads.transpose(0, 2, 1, 3).reshape(kernel.shape)


def _assets(file: Path, config: ModelConfig) -> Assets:
    files: tuple[tuple[str, bytes], ...] = ()
    if pieces := _pieces(file, config.vocabulary):
        options = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        }
        files = (
            ("tokenizer.json", sentence_piece_bpe(pieces).encode()),
            ("tokenizer_config.json", json.dumps(options).encode()),
        )
    return Assets(files=files, max_length=config.positions, source=file.stem, end_tokens=(_END,))


def _pieces(file: Path, vocabulary: int) -> list[tuple[str, float]]:
    """(piece, score) of every token, from the tokenizer beside a checkpoint with as many; empty when there is none."""
    for path in sorted([*file.parent.glob("*.bin"), *file.parent.glob("*.vocab")]):
        pieces = [] if path == file else _read_pieces(path)
        if len(pieces) == vocabulary:
            return pieces
    return []


def _read_pieces(path: Path) -> list[tuple[str, float]]:
    content: Any = path.read_bytes()
    try:
        if path.suffix == ".vocab":
            rows = [line.split("\t") for line in content.decode("utf-8").split("\n") if line]
            return [(piece, float(score)) for piece, score in rows]
        found, offset = [], 4  # after the length of the longest token
        while offset < len(content):
            score, length = struct.unpack_from("<fi", content, offset)
            offset += 8
            if length < 0 or offset + length > len(content):
                return []
            text = content[offset : offset + length].decode("utf-8")
            offset += length
            found.append(("▁".join(text.split(" ")) if len(found) > _END else text.strip(), score))
        return found
    except (UnicodeDecodeError, ValueError, struct.error):
        return []


CHECKPOINT = Checkpoint(find_checkpoint, read_checkpoint)
