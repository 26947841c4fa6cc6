"""How well a masked language model finds hidden tokens."""

from __future__ import annotations

from typing import Any

from flaxcompress.data.documents import Corpus
from flaxcompress.data.tasks import masked_lm_batches
from flaxcompress.evaluate.tasks.task import Result
from flaxcompress.evaluate.tasks.token_sums import TokenSums
from flaxcompress.model import Model
from flaxcompress.progress import progress_bar


def masked_tokens(
    model: Model,
    corpus: Corpus,
    *,
    reference: Model | None,
    length: int,
    batch_size: int,
    seed: int,
    mask_rate: float,
    ngram: int,
    progress: bool,
) -> Result:
    """n stretches of text, their masked tokens, and the figures of the task "lm"; `reference` has the same tokens."""
    options: dict[str, Any] = {"length": length, "batch_size": batch_size, "seed": seed, "mask_rate": mask_rate}
    batches = masked_lm_batches(
        corpus,
        model.assets,
        ngram=ngram,
        sentence_order=model.config.head == "pretraining",
        vocabulary=model.config.vocabulary,
        pad=model.config.pad_token,
        epochs=1,
        shuffle=False,
        **options,
    )
    sums = TokenSums(model, reference)
    try:
        with progress_bar("lm", batches.per_epoch, show=progress) as advance:
            for batch in batches:
                sums.add(batch)
                advance()
    finally:
        batches.close()
    out: Result = {"n": batches.rows, "tokens": round(sums.sums["tokens"]), **sums.result()}
    return out if reference is None else out | sums.result("reference_") | sums.compared()
