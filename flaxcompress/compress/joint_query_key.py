"""Narrower queries and keys: a head's two maps cut together, since only their product counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Float

from flaxcompress import linalg
from flaxcompress.compress.matrix_statistics import INPUTS, gather
from flaxcompress.compress.narrow import (
    check_plain,
    dense_rules,
    input_means,
    matrices,
    narrower,
    with_matrices,
)
from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.compress.uncompressed import check_uncompressed
from flaxcompress.config import ModelConfig, Rotary
from flaxcompress.model import Model, abstract_flat


def compress_heads(
    query: Float[np.ndarray, "D1 H*d"],
    key: Float[np.ndarray, "D K*d"],
    query_moment: Float[np.ndarray, "D1 D1"],
    key_moment: Float[np.ndarray, "D D"],
    *,
    groups: int,
    width: int,
) -> tuple[Float[np.ndarray, "D1 H*r"], Float[np.ndarray, "D K*r"], Float[np.ndarray, "K d"]]:
    """The maps of H query heads and K key heads at width r, and each group's spectrum.

    Least is the error of the scores x·W_q·W_kᵀ·yᵀ of independent tokens x and y with these second moments, summed over
    the heads that read one key head (MoDeGPT, Lin et al. 2024, keeps whole
    columns here).
    """
    d = key.shape[1] // groups
    each = query.shape[1] // (groups * d)
    queries, keys, spectra = [], [], []
    for k in range(groups):
        into = key[:, k * d : (k + 1) * d]
        asked = query[:, k * each * d : (k + 1) * each * d].reshape(-1, each, d).transpose(1, 0, 2)
        first = np.sum([one.T @ query_moment @ one for one in asked], axis=0)
        down, up, spectrum = linalg.cut_between(first, into.T @ key_moment @ into, width)
        queries += [one @ down for one in asked]
        keys.append(into @ up.T)
        spectra.append(spectrum)
    return np.concatenate(queries, 1), np.concatenate(keys, 1), np.stack(spectra)


def pair_scores(
    query: Float[np.ndarray, "D1 H*d"],
    key: Float[np.ndarray, "D1 K*d"],
    moment: Float[np.ndarray, "D1 D1"],
    *,
    groups: int,
    width: int,
) -> Float[np.ndarray, " h"]:
    """What each of d/2 rotary pairs adds to the scores: Σ over heads of ‖C^½W_q,j‖‖C^½W_k,j‖ (MoDeGPT, 2024)."""

    def sizes(kernel: np.ndarray) -> np.ndarray:
        power = np.einsum("nm,nk,km->m", kernel, moment, kernel, optimize=True).reshape(-1, 2, width // 2)
        return np.sqrt(np.maximum(power.sum(1), 0.0))  # [heads, d/2]; a pair's columns stand d/2 apart

    asked, read = sizes(query), sizes(key)
    return (asked.reshape(groups, -1, width // 2) * read[:, None]).sum((0, 1))


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class JointQueryKey(Step):
    """Makes every head's query and key narrower. Nothing is added to a forward pass, and the cache shrinks.

    Without rotary positions each head gets the best product of that rank. A key's bias adds the same to all scores of a
    query, and so nothing to probabilities: it is dropped, and keys count by their covariance; a query's bias is a row
    of its map. With rotary positions only whole pairs can go, the same ones in all heads and layers, since they share
    their frequencies: those that add most to the scores stay as they are.

    Attributes:
      width: r, the heads' width of query and key (even, with rotary positions), or
      keep: the fraction of their width.
      sentences: calibration sentences.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_moments"})

    width: int | None = None
    keep: float | None = None
    sentences: int = 768

    def _width(self, config: ModelConfig) -> int:
        check_plain(
            config,
            self.name,
            attention_of_another_kind_than_full=config.attention is not None,
            norms_of_queries_and_keys=config.query_key_norm,
            convolved_projections=config.projection_kernel > 0,
        )
        return narrower(self.width, self.keep, config.query_key_dim, self.name, 1 if config.rotary is None else 2)

    def plan(self, config: ModelConfig) -> ModelConfig:
        # Which rotary pairs stay is known only from data; the first ones stand for them.
        return self._planned(config, tuple(range(self._width(config) // 2)))

    def _planned(self, config: ModelConfig, pairs: tuple[int, ...]) -> ModelConfig:
        names = [f"{name}/{leaf}" for name in ("query", "key") for leaf in ("kernel", "bias")]
        prefixes = [f"layers/{number}/attention/" for number in range(config.sharing.sets("attention"))]
        present = abstract_flat(config)
        changes: dict[str, Any] = {"query_key_width": self._width(config)}
        if config.attention_scale is None:
            changes["attention_scale"] = config.query_key_dim**-0.5
        if config.rotary is not None:
            changes["rotary"] = _with_pairs(config.rotary, pairs, config.query_key_dim)
        changed = [p + n for p in prefixes for n in names if p + n in present]
        check_uncompressed(present, changed, self.name)
        config = dense_rules(config, changed)
        return config.replace(**changes)

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        calibration, old = context.need(self), model.config
        prefixes = [f"layers/{number}/attention/" for number in range(old.sharing.sets("attention"))]
        shapes = {f"{p}query/kernel": (old.width, old.heads * old.query_key_dim) for p in prefixes}
        settings: Any = {"sentences": self.sentences, "where": self.name, "progress": context.progress}
        known = gather(model, calibration, shapes, {INPUTS}, **settings)
        means = input_means(model, calibration, sentences=self.sentences)
        uses = np.bincount(old.sharing.attention)  # moments and means are sums over a set's uses
        parts: dict[str, _Part] = {}
        for number, prefix in enumerate(prefixes):
            moment = known[f"{prefix}query/kernel"].input_moments
            assert moment is not None
            mean = means[prefix.rstrip("/")] / uses[number]
            parts[prefix] = _Part(matrices(model, prefix, self.name), moment / uses[number], mean)
        width, heads = self._width(old), (old.groups, old.query_key_dim)
        if old.rotary is None:
            return with_matrices(model, self.plan(old), self._products(parts, old.groups, width, context))
        scores = sum(
            pair_scores(p.augmented("query"), p.augmented("key"), p.second_moment, groups=heads[0], width=heads[1])
            for p in parts.values()
        )
        pairs = np.sort(np.argsort(-scores, kind="stable")[: width // 2])
        columns = np.concatenate([pairs, pairs + old.query_key_dim // 2])
        changes = {}
        for prefix, part in parts.items():
            for path, held in part.held.items():
                if path.split("/")[0] in ("query", "key"):
                    split = held.reshape(*held.shape[:-1], -1, old.query_key_dim)
                    changes[prefix + path] = split[..., columns].reshape(*held.shape[:-1], -1)
        return with_matrices(model, self._planned(old, tuple(pairs.tolist())), changes)

    def _products(self, parts: Mapping[str, _Part], groups: int, width: int, context: Context) -> dict[str, np.ndarray]:
        changes = {}
        for prefix, part in parts.items():
            query, key, spectra = compress_heads(
                part.augmented("query"),
                part.held["key/kernel"],
                part.second_moment,
                part.covariance,
                groups=groups,
                width=width,
            )
            changes |= {f"{prefix}query/kernel": query[:-1], f"{prefix}key/kernel": key}
            if "query/bias" in part.held:
                changes |= {f"{prefix}query/bias": query[-1], f"{prefix}key/bias": np.zeros(key.shape[1])}
            for k, spectrum in enumerate(spectra):
                context.keep_spectrum(f"{prefix}key/{k}", spectrum, width)
        return changes


@dataclasses.dataclass(frozen=True)
class _Part:
    """One attention part's matrices, and the first two moments of its input."""

    held: Mapping[str, np.ndarray]
    moment: Float[np.ndarray, "D D"]
    mean: Float[np.ndarray, " D"]

    def augmented(self, name: str) -> Float[np.ndarray, "D1 m"]:
        """A map with its bias as the last row; zeros where there is none."""
        kernel = self.held[f"{name}/kernel"]
        return np.vstack([kernel, self.held.get(f"{name}/bias", np.zeros(kernel.shape[1]))])

    @property
    def second_moment(self) -> Float[np.ndarray, "D1 D1"]:
        """Of the input with a one at its end."""
        return np.block([[self.moment, self.mean[:, None]], [self.mean[None], np.ones((1, 1))]])

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]:
        """Of the input."""
        return self.moment - np.outer(self.mean, self.mean)


def _with_pairs(rotary: Rotary, pairs: tuple[int, ...], width: int) -> Rotary:
    """Rotary positions of heads of some width from which only these pairs are left."""
    if 2 * len(pairs) == width:
        return rotary
    before = rotary.pairs or tuple(range(width // 2))
    kept = tuple(before[j] for j in pairs)
    return dataclasses.replace(rotary, pairs=kept, pairs_of=rotary.pairs_of or width)
