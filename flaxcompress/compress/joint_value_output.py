"""Narrower values: a head's value and output maps cut together, since only their product counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Float

from flaxcompress import linalg
from flaxcompress.compress.matrix_statistics import INPUTS, gather
from flaxcompress.compress.narrow import check_plain, dense_rules, matrices, narrower, with_matrices
from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.compress.uncompressed import check_uncompressed
from flaxcompress.config import ModelConfig
from flaxcompress.model import Model, abstract_flat


def compress_heads(
    value: Float[np.ndarray, "D K*d"],
    output: Float[np.ndarray, "H*d D"],
    second_moment: Float[np.ndarray, "D D"],
    *,
    groups: int,
    width: int,
) -> tuple[Float[np.ndarray, "D K*r"], Float[np.ndarray, "H*r D"], Float[np.ndarray, "K d"]]:
    """The maps of K value heads and H output heads at head width r, and each group's spectrum.

    A head gives p·x·W_v·W_o, p its probabilities. What is least is the error of x·W_v·W_o on the tokens x that are
    attended to, summed over the heads that read one value head (MoDeGPT, Lin et al. 2024).
    """
    d = value.shape[1] // groups
    each = output.shape[0] // (groups * d)  # query heads of a value head
    values, outputs, spectra = [], [], []
    for k in range(groups):
        into = value[:, k * d : (k + 1) * d]
        out = output[k * each * d : (k + 1) * each * d].reshape(each, d, -1)
        second = np.einsum("edD,efD->df", out, out)
        down, up, spectrum = linalg.cut_between(into.T @ second_moment @ into, second, width)
        values.append(into @ down)
        outputs.append((up @ out).reshape(each * width, -1))
        spectra.append(spectrum)
    return np.concatenate(values, 1), np.concatenate(outputs), np.stack(spectra)


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class JointValueOutput(Step):
    """Makes every head's value narrower, with the output map that reads it. Nothing is added to a forward pass.

    A value's bias goes through the output map into the output's bias, exactly, since probabilities sum to one; a model
    without that bias gets it.

    Attributes:
      width: r, the heads' value width, or
      keep: the fraction of their width.
      sentences: calibration sentences.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_moments"})

    width: int | None = None
    keep: float | None = None
    sentences: int = 768

    def _width(self, config: ModelConfig) -> int:
        check_plain(config, self.name, attention_of_another_kind_than_full=config.attention is not None)
        return narrower(self.width, self.keep, config.head_dim, self.name)

    def plan(self, config: ModelConfig) -> ModelConfig:
        width = self._width(config)
        names = ("value/kernel", "output/kernel", "value/bias", "output/bias")
        prefixes = [f"layers/{number}/attention/" for number in range(config.sharing.sets("attention"))]
        present = abstract_flat(config)
        changed = [p + n for p in prefixes for n in names if p + n in present]
        check_uncompressed(present, changed, self.name)
        config = dense_rules(config, changed)
        return config.replace(
            head_width=width,
            query_key_width=config.query_key_dim,
            output_bias=config.output_bias or config.attention_bias,
        )

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        config = self.plan(model.config)
        width, groups = self._width(model.config), model.config.groups
        prefixes = [f"layers/{number}/attention/" for number in range(config.sharing.sets("attention"))]
        shapes = {f"{p}value/kernel": (model.config.width, groups * model.config.head_dim) for p in prefixes}
        settings: Any = {"sentences": self.sentences, "where": self.name, "progress": context.progress}
        known = gather(model, context.need(self), shapes, {INPUTS}, **settings)
        changes: dict[str, np.ndarray] = {}
        for prefix in prefixes:
            held = matrices(model, prefix, self.name)
            moment = known[f"{prefix}value/kernel"].input_moments
            assert moment is not None
            value, output, spectra = compress_heads(
                held["value/kernel"], held["output/kernel"], moment, groups=groups, width=width
            )
            changes |= {f"{prefix}value/kernel": value, f"{prefix}output/kernel": output}
            if "value/bias" in held:
                changes[f"{prefix}value/bias"] = np.zeros(groups * width)
                changes[f"{prefix}output/bias"] = _folded(held, groups, model.config.heads)
            for k, spectrum in enumerate(spectra):
                context.keep_spectrum(f"{prefix}value/{k}", spectrum, width)
        return with_matrices(model, config, changes)


def _folded(held: Mapping[str, np.ndarray], groups: int, heads: int) -> Float[np.ndarray, " D"]:
    """The output's bias with what the values' bias adds to every token."""
    bias = np.repeat(held["value/bias"].reshape(groups, -1), heads // groups, axis=0).reshape(-1)
    return held.get("output/bias", 0.0) + bias @ held["output/kernel"]
