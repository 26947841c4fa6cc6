"""The task "translation": BLEU and chrF of what a model with a decoder makes of texts."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flaxcompress.data.documents import is_record_source, source_records
from flaxcompress.data.parallel import read_parallel
from flaxcompress.data.readers import refuse
from flaxcompress.evaluate.tasks.task import Result, beside, data_name, last_of, need_count, need_data, need_head
from flaxcompress.model import Model
from flaxcompress.progress import progress_bar

log = logging.getLogger("flaxcompress")

_TASK = "translation"
_MOST_NEW = 511  # tokens, where a decoder has no limit to speak of
_EXAMPLES = 3


def translation(
    model: Model,
    *,
    data: Any = None,
    reference: Model | None = None,
    progress: bool = False,
    targets: Any = None,
    columns: Sequence[str] = (),
    hold_out: int = 0,
    beams: int = 4,
    max_new_tokens: int | None = None,
    prefix: str = "",
    batch_size: int = 32,
) -> Result:
    """data, n, bleu and chrf as sacrebleu counts them, and their signatures; some examples.

    Args:
      data: a file with a text per line, or a tsv or jsonl file with texts and translations; or (text, translation)
        items.
      targets: the file of the translations, line by line, where they are not in `data`.
      columns: of the text and its translation; by default the first two of the file.
      hold_out: only the last so many pairs, as training's data/hold_out leaves them.
      beams: 1 is greedy.
      max_new_tokens: of a translation, by default as many as the decoder has positions for.
      prefix: put before every text, such as T5's "translate English to German: ".

    Raises ValueError for another head, for files of different lengths, and where sacrebleu is not installed.
    """
    need_data(data, _TASK, "a file of texts, with --targets for their translations, or a tsv file with both")
    for name, value in (("beams", beams), ("batch_size", batch_size)):
        need_count(_TASK, name, value)
    models = [model] if reference is None else [model, reference]
    for one, who in zip(models, ("the model", "the reference"), strict=False):
        need_head(one, _TASK, "seq2seq_lm", who=who)
    metrics = _metrics()
    pairs = last_of(_pairs(data, targets, columns), hold_out, _TASK)
    sources, wanted = [prefix + one for one, _ in pairs], [two for _, two in pairs]
    options = {"beams": beams, "max_new_tokens": max_new_tokens, "batch_size": batch_size, "progress": progress}
    answers = [_translate(one, sources, **options) for one in models]
    scores = [{name: metric.corpus_score(each, [wanted]).score for name, metric in metrics.items()} for each in answers]
    out: Result = {"data": data_name(data, "given pairs"), "n": len(pairs), "beams": beams}
    out |= beside(scores[0], scores[1] if len(scores) > 1 else None)
    out |= {f"{name}_signature": str(metric.get_signature()) for name, metric in metrics.items()}
    rows = range(0, len(pairs), -(-len(pairs) // _EXAMPLES))
    out["examples"] = [{"source": sources[i], "target": wanted[i], "answer": answers[0][i]} for i in rows]
    return out


def _metrics() -> dict[str, Any]:
    try:
        import sacrebleu
    except ImportError:
        raise ValueError(f"{_TASK}: scores need sacrebleu: pip install 'flaxcompress[evaluate]'") from None
    return {"bleu": sacrebleu.BLEU(), "chrf": sacrebleu.CHRF()}


def _pairs(data: Any, targets: Any, columns: Sequence[str]) -> list[tuple[str, str]]:
    if columns and len(columns) != 2:
        raise ValueError(f"{_TASK}: columns are those of a text and its translation; got {len(columns)}")
    if targets is not None:
        if columns:
            raise ValueError(f"{_TASK}: targets are a file of their own: name columns as FILE:COLUMN, not by columns")
        return list(read_parallel(data, targets, max_bad_lines=0))
    if not isinstance(data, (str, Path)):
        items = [tuple(item) for item in data]
        if not items or not all(len(item) == 2 and all(isinstance(x, str) for x in item) for item in items):
            raise ValueError(f"{_TASK}: (text, translation) items are needed, or files")
        return list(read_parallel(*map(list, zip(*items, strict=True)), max_bad_lines=0))
    if not is_record_source(data):
        raise ValueError(f"{_TASK}: {data} holds a text per line; give the file of their translations too: --targets")
    one, two = columns or _first_columns(data)
    return list(read_parallel(f"{data}:{one}", f"{data}:{two}", max_bad_lines=0))


def _first_columns(file: str | Path) -> tuple[str, str]:
    _, _, records = source_records(file, bad=refuse)
    head = list(itertools.islice(records, 1))
    names = list(head[0][1]) if head else []
    if len(names) < 2:
        raise ValueError(f"{_TASK}: {file} needs two columns, a text and its translation; it has {', '.join(names)}")
    return names[0], names[1]


def _translate(
    model: Model, sources: Sequence[str], *, beams: int, max_new_tokens: int | None, batch_size: int, progress: bool
) -> list[str]:
    """Texts of like lengths share a batch."""
    assert model.config.decoder is not None
    if max_new_tokens is None:
        max_new_tokens = min(model.config.decoder.positions - 1, _MOST_NEW)
    need_count(_TASK, "max_new_tokens", max_new_tokens)
    rows = model.assets.tokenize(sources)
    if rows.truncated:
        cut, limit = rows.truncated, model.assets.max_length
        log.warning("%d of %d texts were longer than %d tokens and were cut", cut, len(sources), limit)
    order = sorted(range(len(sources)), key=lambda i: len(rows.ids[i]))
    answers = [""] * len(sources)
    with progress_bar(_TASK, len(sources), show=progress) as advance:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            filled = [rows.ids[i] for i in (*chosen, *chosen[:1] * (batch_size - len(chosen)))]
            filled = filled if start else filled[: len(chosen)]
            found = model.generate(filled, max_new_tokens=max_new_tokens, beams=beams)
            for i, text in zip(chosen, found, strict=False):
                answers[i] = text.strip()
            advance(len(chosen))
    return answers
