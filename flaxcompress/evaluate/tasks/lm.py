"""The task "lm": the loss of a language model, causal or masked, on text."""

from __future__ import annotations

import functools
from typing import Any

from flaxcompress.data.documents import Corpus
from flaxcompress.data.frame import find_frame, whole_tokenizer
from flaxcompress.data.portion import Portion
from flaxcompress.evaluate.tasks.masked_tokens import masked_tokens
from flaxcompress.evaluate.tasks.next_tokens import next_tokens
from flaxcompress.evaluate.tasks.task import Result, beside, data_name, need_count, need_data, need_head
from flaxcompress.model import Model

_TASK = "lm"
_LENGTH = 1024  # of a window at most, unless it is given
_LOGITS = 1 << 26  # computed at once: 256 MB
_ROWS = 16
_MASKED = ("masked_lm", "pretraining")


def lm(
    model: Model,
    *,
    data: Any = None,
    reference: Model | None = None,
    progress: bool = False,
    separator: str | None = None,
    hold_out: int = 0,
    length: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    mask_rate: float | None = None,
    ngram: int | None = None,
) -> Result:
    """nats_per_token, perplexity and accuracy of the next token, or of masked ones; of the next, also bits_per_byte.

    Documents longer than `length` are read in windows, each of which has the second half of the one before it as
    context; the tokens that begin and end a document are not counted. With the head "pretraining" there is
    sentence_order_accuracy too. With a reference of the same vocabulary: kl_per_token, KL(reference ‖ model) on average
    over the counted tokens, and agreement, how often both find the same token likeliest; across vocabularies,
    bits_per_byte is what can be compared.

    Args:
      data: text files, texts, or a `Corpus`.
      separator: what stands between documents, see `Corpus`; by default every line is one.
      hold_out: only the last so many documents, as training's data/hold_out leaves them.
      length: tokens of a window, by default as many as the model reads, 1,024 at most.
      batch_size: windows run at once, by default as many as fit into some hundred MB.
      seed, mask_rate, ngram: of masked models: which tokens are hidden, see `data.masked_lm_batches`; 0, 0.15 and 3.

    Raises ValueError for another head, for a line that cannot be read, and for options of the other kind of model.
    """
    need_head(model, _TASK, "causal_lm", *_MASKED)
    causal = model.config.head == "causal_lm"
    if reference is not None:
        need_head(reference, _TASK, *(("causal_lm",) if causal else _MASKED), who="the reference")
    corpus = _corpus(data, separator, hold_out)
    settings = _settings(causal, seed=seed, mask_rate=mask_rate, ngram=ngram)
    models = [model] if reference is None else [model, reference]
    sizes = _sizes(models, length, batch_size, settings.get("mask_rate", 1.0))
    measure: Any = functools.partial(next_tokens if causal else masked_tokens, progress=progress, **settings)
    name = data_name(data.source if isinstance(data, Corpus) else data, "given texts")
    if reference is None or _same_tokens(model, reference):
        smallest = {key: min(each[key] for each in sizes) for key in sizes[0]}
        found = measure(model, corpus, reference=reference, **smallest)
        return {"data": name, **found, "length": smallest["length"], **settings}
    found, other = (
        {**measure(one, corpus, reference=None, **size), "length": size["length"]}
        for one, size in zip(models, sizes, strict=True)
    )
    return {"data": name} | beside(found, other) | settings | {"kl_per_token": None, "agreement": None}


def _settings(causal: bool, **given: Any) -> dict[str, Any]:
    """Which tokens a masked model does not see. Raises ValueError where a causal one is told."""
    stated = {name: value for name, value in given.items() if value is not None}
    if causal and stated:
        raise ValueError(f"{_TASK}: {', '.join(stated)}: for masked models only; this one predicts the next token")
    return {} if causal else {"seed": 0, "mask_rate": 0.15, "ngram": 3, **stated}


def _sizes(models: list[Model], length: int | None, batch_size: int | None, share: float) -> list[dict[str, int]]:
    """length and batch_size for each model, of whose tokens a share has logits."""
    for name, value, least in (("length", length, 2), ("batch_size", batch_size, 1)):
        if value is not None:
            need_count(_TASK, name, value, least)
    most = min(min(one.config.positions, one.assets.max_length) for one in models)
    if length is not None and most < length:
        raise ValueError(f"{_TASK}: windows of {length} tokens, but the models read {most}; make them shorter")
    found = []
    for one in models:
        limit = length or min(_LENGTH, one.config.positions, one.assets.max_length)
        rows = int(_LOGITS / max(1.0, share * limit * one.config.vocabulary))
        found.append({"length": limit, "batch_size": batch_size or max(1, min(_ROWS, rows))})
    return found


def _corpus(data: Any, separator: str | None, hold_out: int) -> Corpus:
    need_data(data, _TASK, "a text file, or a list of texts")
    need_count(_TASK, "hold_out", hold_out, 0)
    if not isinstance(data, Corpus):
        return Corpus(data, separator=separator, max_bad_lines=0, portion=Portion(hold_out, held_out=True))
    if separator is not None or hold_out:
        raise ValueError(f"{_TASK}: a Corpus says itself what stands between documents, and which are read")
    return data


def _same_tokens(model: Model, reference: Model) -> bool:
    """Whether both cut texts alike and have logits for the same tokens."""
    if model.config.vocabulary != reference.config.vocabulary:
        return False
    if model.assets.files == reference.assets.files:
        return True
    vocabularies = [whole_tokenizer(one.assets).get_vocab(with_added_tokens=True) for one in (model, reference)]
    return vocabularies[0] == vocabularies[1] and find_frame(model.assets) == find_frame(reference.assets)
