"""Calibration text as tokens, and a model's statistics on it: each gathered once, under jit, and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from flaxcompress.compress import statistics
from flaxcompress.compress.kept import KeptStatistics
from flaxcompress.compress.statistics import Batch
from flaxcompress.compress.tiers import token_weights
from flaxcompress.data import CalibrationText
from flaxcompress.model import Model
from flaxcompress.nn.logical import BATCH
from flaxcompress.text import Assets, first_ordinary_token, pad_ids

_LENGTHS = (32, 64, 128, 256, 512)


class Calibration:
    """Calibration text as tokens, and what the methods need to know about it.

    Attributes:
      text: the sentences, a calibration part and a held-out part.
      rows: token ids of the calibration sentences, cut to `max_length` tokens; some of them scrambled.
      token_counts: [V], how often each token occurs in the sentences as they are.

    Args:
      scrambled: the share of sentences whose tokens, but for the first and the last, are exchanged for others drawn
        from the whole vocabulary, by the weights that its table is approximated with. Text of one domain uses few of
        the words that the model will meet, and any input shows how the original answers.
      folder: where statistics are kept for later runs on the same model and text; None: only in memory.
      mesh: devices over whose data axes each batch is cut; the sums over them are the compiler's.
    """

    def __init__(
        self,
        text: CalibrationText,
        assets: Assets,
        *,
        vocabulary: int,
        max_length: int = 64,
        scrambled: float = 0.0,
        folder: str | Path | None = None,
        mesh: Mesh | None = None,
    ):
        self.text = text
        self.vocabulary = vocabulary
        self._settings: dict[str, Any] = {
            "max_length": max_length,
            "scrambled": scrambled,
            "folder": folder,
            "mesh": mesh,
        }
        limit = min(max_length, assets.max_length)
        self.rows = [cut(row, limit) for row in assets.tokenize(text.train).ids]
        flat = np.concatenate([np.asarray(row, np.int64) for row in self.rows])
        self.token_counts = np.bincount(flat, minlength=vocabulary).astype(np.float64)
        if scrambled:
            self.rows = _scrambled(self.rows, scrambled, self.token_counts, first_ordinary_token(assets))
        self._mesh = mesh
        self._kept = None if folder is None else KeptStatistics(Path(folder), self.rows)
        self._statistics: dict[str, tuple[Any, Any]] = {}

    def with_tokens(self, assets: Assets, vocabulary: int) -> Calibration:
        """The same text, cut by another tokenizer."""
        return Calibration(self.text, assets, vocabulary=vocabulary, **self._settings)

    def sample(self, count: int, *, seed: int = 0) -> list[list[int]]:
        """`count` different sentences, drawn by `seed`; all of them when there are fewer."""
        order = np.random.default_rng(seed).permutation(len(self.rows))[:count]
        return [self.rows[i] for i in order]

    def batches(self, count: int, *, size: int = 16, pad: int = 0, seed: int = 0) -> list[Batch]:
        """`count` sentences in padded batches of similar length, cut over the mesh where there is one."""
        parts = _data_size(self._mesh)
        batches = make_batches(self.sample(count, seed=seed), size=-(-size // parts) * parts, pad=pad)
        if self._mesh is None:
            return batches
        placed = NamedSharding(self._mesh, PartitionSpec(BATCH))
        return [(jax.device_put(ids, placed), jax.device_put(mask, placed)) for ids, mask in batches]

    def input_moments(self, model: Model, *, sentences: int = 768, progress: bool = False) -> dict[str, np.ndarray]:
        """{address of a linear map: C = E[xᵀx], [n, n] float32} over the real tokens (see `statistics`)."""
        return self._cached("input_moments", model, sentences, 16, progress=progress)

    def gradient_moments(self, model: Model, *, sentences: int = 256, progress: bool = False) -> dict[str, np.ndarray]:
        """{address of a linear map: G = E[gᵀg], [m, m] float32} of its output's gradient (see `statistics`)."""
        return self._cached("gradient_moments", model, sentences, 16, progress=progress)

    def fisher(self, model: Model, *, sentences: int = 256, progress: bool = False) -> dict[str, np.ndarray]:
        """{address of a matrix: expected squared gradient, its shape} of the model's answer (see `statistics`)."""
        return self._cached("fisher", model, sentences, 8, progress=progress)

    def norms(self, model: Model, *, sentences: int = 768, progress: bool = False) -> dict[str, np.ndarray]:
        """{address of a linear map: √E[x_i²] of each input channel, [n] float32}."""
        moments = self.input_moments(model, sentences=sentences, progress=progress)
        return {address: np.sqrt(np.diagonal(moment)) for address, moment in moments.items()}

    def token_gradient_moment(self, model: Model, *, sentences: int = 256) -> Float[np.ndarray, "D D"]:
        """G = E[gᵀg] of a token's vector: the metric in which a table should be approximated (see `statistics`)."""
        return self._cached("token_gradient_moment", model, sentences, 8)

    def head_moment(self, model: Model, *, sentences: int = 768) -> Float[np.ndarray, "E E"]:
        """C = E[hᵀh] of what a head tied to the token table multiplies by it (see `statistics`)."""
        return self._cached("head_moment", model, sentences, 16)

    def influence(self, model: Model, *, sentences: int = 256) -> Float[np.ndarray, " L"]:
        """Block influence of every layer (see `statistics`)."""
        return self._cached("influence", model, sentences, 16)

    def tokens_per_sentence(self, *, sentences: int = 768) -> float:
        """The mean length of the sentences that statistics are taken on."""
        return float(np.mean([len(row) for row in self.sample(sentences)]))

    def _cached(self, name: str, model: Model, sentences: int, size: int, **options: Any) -> Any:
        """A statistic by the name of its function, from memory or the folder, or measured."""
        at = f"{name} {sentences}"
        held = self._statistics.get(at)
        if held is None or held[0] is not model.params:  # another model: its inputs differ, so measure again

            def measure() -> Any:
                gather: Callable[..., Any] = getattr(statistics, name)
                batches = self.batches(sentences, size=size, pad=model.config.pad_token)
                return gather(self._on_mesh(model), batches, **options)

            found = measure() if self._kept is None else self._kept.get(at, model, measure)
            self._statistics[at] = held = (model.params, found)
        return held[1]

    def _on_mesh(self, model: Model) -> Model:
        """The model with its weights on every device of the mesh."""
        if self._mesh is None:
            return model
        whole = NamedSharding(self._mesh, PartitionSpec())
        return model.replace(params=jax.device_put(model.params, whole))  # pyright: ignore[reportAttributeAccessIssue]


def _data_size(mesh: Mesh | None) -> int:
    return 1 if mesh is None else int(np.prod([mesh.shape.get(axis, 1) for axis in BATCH]))


def _scrambled(rows: list[list[int]], share: float, counts: np.ndarray, start: int) -> list[list[int]]:
    """Rows of which a share has all but its first and last token drawn anew, ordinary tokens only."""
    weights = token_weights(counts, start=start)
    weights[:start] = 0.0
    ends, rng = np.cumsum(weights / weights.sum()), np.random.default_rng(0)
    out = []
    for row in rows:
        if rng.random() < share and len(row) > 2:
            drawn = np.searchsorted(ends, rng.random(len(row) - 2), side="right")
            row = [row[0], *np.minimum(drawn, len(counts) - 1).tolist(), row[-1]]
        out.append(row)
    return out


def cut(row: Sequence[int], limit: int) -> list[int]:
    """At most `limit` tokens: the first ones, and the last, which closes a text ([SEP])."""
    return list(row) if len(row) <= limit else [*row[: limit - 1], row[-1]]


def make_batches(rows: Sequence[Sequence[int]], *, size: int, pad: int) -> list[Batch]:
    """Sorts sentences by length and pads each batch to one of a few lengths; the last batch is filled with padding."""
    ordered = sorted(rows, key=len)
    batches = []
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        longest = len(part[-1])
        length = next((n for n in _LENGTHS if n >= longest), longest)
        batches.append(pad_ids(part, length, size, pad))
    return batches
