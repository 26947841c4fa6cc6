"""Dropping the tokens that a corpus does not use: from the tokenizer, and from weights with a row for each token."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import numpy as np

from flaxcompress import tree
from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.compress.tokenizer_files import Files, trimmed, whole_tokenizer
from flaxcompress.config import ModelConfig
from flaxcompress.data import read_texts
from flaxcompress.formats import BucketedSpec, LowRankSpec, Spec, Tier, parse_spec, select, spec_of
from flaxcompress.model import Model

_TABLE = "embedding/token"
_WORD_HEADS = {"masked_lm", "pretraining", "causal_lm", "seq2seq_lm"}  # those with an output for each token


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrimVocabulary(Step):
    """Keeps the tokens that a corpus is cut into, and those without which the tokenizer would not be valid.

    These are special and added tokens, single characters (of WordPiece also as continuations), bytes, and the steps by
    which byte-pair encoding gets to a kept token. Every text of the corpus is cut as before and has the same vector; a
    word that needs a dropped token is spelled with shorter ones. Rows keep their format and their values.

    Attributes:
      texts: files of the corpus, each "FILE" or "FILE:column"; none: the calibration text, all of it.
      keep: further tokens to keep, as the tokenizer writes them ("##ing").
    """

    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    texts: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def resolve(self, model: Model) -> TrimVocabulary:
        """Reads the corpus where it is one of files, for the plan to know how many tokens are kept."""
        if not self.texts:
            return self
        ids, _ = self._choose(model, self._read())
        return _Chosen(texts=self.texts, keep=self.keep, ids=tuple(ids))

    def plan(self, config: ModelConfig) -> ModelConfig:
        """The vocabulary as it is, an upper bound: the calibration text is not known yet."""
        if not config.vocabulary:
            raise ValueError(f"TrimVocabulary: a {config.family} model has no vocabulary")
        return config

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        del key
        if self.texts:
            texts = self._read()
        else:
            text = context.need(self).text
            texts = [*text.train, *text.held_out]
        ids, files = self._choose(model, texts)
        return keep_tokens(model, ids, files)

    def _read(self) -> list[str]:
        return [text for file in self.texts for text in read_texts(file)]

    def _choose(self, model: Model, texts: Sequence[str]) -> tuple[list[int], Files]:
        config, assets = model.config, model.assets
        if not assets.has_tokenizer:
            raise ValueError("TrimVocabulary: the checkpoint has no tokenizer")
        known = whole_tokenizer(assets.files).get_vocab()
        if unknown := [token for token in self.keep if token not in known]:
            raise ValueError(f"TrimVocabulary: keep: the tokenizer has no token {unknown[0]!r}")
        # Where positions are counted from the padding token's id, it has to remain what it is.
        pads = range(config.pad_token + 1) if config.position_offset else (config.pad_token,)
        starts = () if assets.start_token is None else (assets.start_token,)
        stay = {*pads, *assets.end_tokens, *starts, *(known[token] for token in self.keep)}
        ids, files = trimmed(assets, texts, stay)
        if ids[-1] >= config.vocabulary:
            raise ValueError(
                f"TrimVocabulary: the tokenizer gives id {ids[-1]}, but the model's vocabulary has "
                f"{config.vocabulary} entries: they do not belong together"
            )
        return ids, files


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chosen(TrimVocabulary):
    """The step when it knows which tokens are kept."""

    ids: tuple[int, ...]

    @property
    def name(self) -> str:
        return TrimVocabulary.__name__

    def resolve(self, model: Model) -> TrimVocabulary:
        del model
        return self

    def plan(self, config: ModelConfig) -> ModelConfig:
        return planned(super().plan(config), self.ids)


def planned(config: ModelConfig, ids: Sequence[int]) -> ModelConfig:
    """The structure with the tokens `ids`; which tier's rows are dropped is not known yet: the last ones'."""
    rule = config.format_rule(_TABLE)
    count = min(len(ids), config.vocabulary)
    if rule is not None and (spec := _with_rows(parse_spec(rule, _TABLE), count)).to_json() != dict(rule):
        config = config.with_format(_TABLE, spec.to_json())
    return config.replace(vocabulary=count, pad_token=bisect.bisect_left(ids, config.pad_token))


def _with_rows(spec: Spec, rows: int) -> Spec:
    if isinstance(spec, LowRankSpec):
        return dataclasses.replace(spec, left=_with_rows(spec.left, rows))
    if not isinstance(spec, BucketedSpec):
        return spec
    tiers = []
    for tier in spec.tiers:
        if (size := min(tier.rows, rows - sum(t.rows for t in tiers))) > 0:
            tiers.append(Tier(rows=size, format=_with_rows(tier.format, size)))
    return BucketedSpec(tiers=tuple(tiers))


def keep_tokens(model: Model, ids: Sequence[int], files: Files) -> Model:
    """The model with the tokens `ids` alone, in this order, and a tokenizer of them."""
    config, chosen = model.config, np.asarray(ids)
    axes = {_TABLE: 0}
    if config.head in _WORD_HEADS:
        axes |= {"head/bias": 0, "head/output/kernel": 1}
    view = tree.View(model.params)
    changes = {address: select(view[address], chosen, axis) for address, axis in axes.items() if address in view}
    new = {old: number for number, old in enumerate(ids)}
    if (spec := spec_of(changes[_TABLE])) != parse_spec(config.format_rule(_TABLE), _TABLE):
        config = config.with_format(_TABLE, spec.to_json())  # the tiers' rows are other numbers now
    assets = model.assets
    start = None if assets.start_token is None else new[assets.start_token]
    never = tuple(new[i] for i in assets.never_tokens if i in new)
    ends = tuple(new[i] for i in assets.end_tokens)
    return Model(
        params=tree.replace(model.params, changes),
        config=config.replace(vocabulary=len(ids), pad_token=new[config.pad_token]),
        assets=dataclasses.replace(assets, files=files, end_tokens=ends, start_token=start, never_tokens=never),
    )


def follow(context: Context, before: Model, after: Model) -> None:
    """After a step that changed the vocabulary, the original and the calibration text get the same tokens."""
    if before.config.vocabulary == after.config.vocabulary:
        return
    old, new = (whole_tokenizer(model.assets.files).get_vocab() for model in (before, after))
    ids = [before.config.pad_token] * after.config.vocabulary  # which may be no token of the tokenizer's
    for token, number in new.items():
        ids[number] = old[token]
    context.original = keep_tokens(context.original, ids, after.assets.files)
    if context.calibration is not None:
        context.calibration = context.calibration.with_tokens(after.assets, after.config.vocabulary)
