"""The task "lm": the loss of a language model, causal or masked, on text."""

from __future__ import annotations

from typing import Any

from flaxcompress.data.documents import Corpus
from flaxcompress.data.frame import find_frame, whole_tokenizer
from flaxcompress.data.portion import Portion
from flaxcompress.evaluate.tasks.masked_tokens import masked_tokens
from flaxcompress.evaluate.tasks.next_tokens import next_tokens
from flaxcompress.evaluate.tasks.task import Result, data_name, need_count, need_data, need_head
from flaxcompress.model import Model

_TASK = "lm"
_LENGTH = 1024  # of a window at most, unless it is given
_LOGITS = 1 << 26  # computed at once: 256 MB
_ROWS = 16
_MASK_RATE = 0.15
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
    models = [model] if reference is None else [model, reference]
    alike = reference is not None and _same_tokens(model, reference)
    if length is not None:
        need_count(_TASK, "length", length, 2)
    limits = [min(_LENGTH if length is None else length, _limit(one)) for one in models]
    if length is not None and min(limits) < length:
        raise ValueError(f"{_TASK}: windows of {length} tokens, but the models read {min(limits)}; make them shorter")
    limits = [min(limits)] * len(limits) if alike else limits
    if batch_size is not None:
        need_count(_TASK, "batch_size", batch_size)
    share = 1.0 if causal else mask_rate or _MASK_RATE
    sizes = [batch_size or _rows(one, share * limit) for one, limit in zip(models, limits, strict=True)]
    options: dict[str, Any] = {"length": limits[0], "batch_size": min(sizes) if alike else sizes[0]}
    measure: Any = next_tokens
    settings = {"seed": seed, "mask_rate": mask_rate, "ngram": ngram}
    stated = {name: value for name, value in settings.items() if value is not None}
    if causal and stated:
        raise ValueError(f"{_TASK}: {', '.join(stated)}: for masked models only; this one predicts the next token")
    if not causal:
        measure, stated = masked_tokens, {"seed": 0, "mask_rate": _MASK_RATE, "ngram": 3, **stated}
    options |= stated
    name = data.source if isinstance(data, Corpus) else data
    found = measure(model, corpus, reference=reference if alike else None, progress=progress, **options)
    out: Result = {"data": data_name(name, "given texts"), **found, "length": limits[0], **stated}
    if reference is not None and not alike:
        options |= {"length": limits[1], "batch_size": sizes[1]}
        other = measure(reference, corpus, reference=None, progress=progress, **options)
        out |= {f"reference_{key}": value for key, value in {**other, "length": limits[1]}.items()}
        out["kl_per_token"] = out["agreement"] = None
    return out


def _corpus(data: Any, separator: str | None, hold_out: int) -> Corpus:
    need_data(data, _TASK, "a text file, or a list of texts")
    need_count(_TASK, "hold_out", hold_out, 0)
    if not isinstance(data, Corpus):
        return Corpus(data, separator=separator, max_bad_lines=0, portion=Portion(hold_out, held_out=True))
    if separator is not None or hold_out:
        raise ValueError(f"{_TASK}: a Corpus says itself what stands between documents, and which are read")
    return data


def _limit(model: Model) -> int:
    return min(model.config.positions, model.assets.max_length)


def _rows(model: Model, counted: float) -> int:
    return max(1, min(_ROWS, int(_LOGITS / (counted * model.config.vocabulary))))


def _same_tokens(model: Model, reference: Model) -> bool:
    """Whether both cut texts alike and have logits for the same tokens."""
    if model.config.vocabulary != reference.config.vocabulary:
        return False
    if model.assets.files == reference.assets.files:
        return True
    vocabularies = [whole_tokenizer(one.assets).get_vocab(with_added_tokens=True) for one in (model, reference)]
    return vocabularies[0] == vocabularies[1] and find_frame(model.assets) == find_frame(reference.assets)
