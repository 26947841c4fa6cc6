"""What the validation losses of the models trained here do not say: BLEU, and bits per byte beside another model's.

    pip install sacrebleu
    python experiments/scratch/measure.py bleu runs/multi30k-shared/model runs/multi30k-untied/model
    python experiments/scratch/measure.py bits runs/tinystories/model $FLAXCOMPRESS_DATA/models/stories260K

Data are read from the folder in FLAXCOMPRESS_DATA; `--json FILE` keeps the figures. BLEU is sacrebleu's of detokenized
text on Multi30k's validation set, German to English, by beams. Bits per byte are over the last 100 stories of the
TinyStories sample, which `tinystories.yaml` holds out, the tokens that begin and end a text not counted: so models with
different tokenizers can be compared.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flaxcompress as fc
from flaxcompress.data import Corpus
from flaxcompress.data.frame import find_frame, whole_tokenizer
from flaxcompress.data.portion import Portion

_ROWS = 16  # of a batch


def data(name: str) -> Path:
    return Path(os.environ["FLAXCOMPRESS_DATA"]) / name


def bleu(name: str, beams: int) -> dict[str, Any]:
    import sacrebleu

    model = fc.load(name)
    source, target = (gzip.decompress(data(f"multi30k/val.{end}.gz").read_bytes()) for end in ("de", "en"))
    sources, targets = (text.decode("utf-8").split("\n")[:-1] for text in (source, target))
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))  # texts of like lengths share a batch
    assert model.config.decoder is not None
    answers = [""] * len(sources)
    for i in range(0, len(order), 2 * _ROWS):
        rows = order[i : i + 2 * _ROWS]
        new = model.config.decoder.positions - 1
        found = model.generate([sources[row] for row in rows], max_new_tokens=new, beams=beams)
        for row, text in zip(rows, found, strict=True):
            answers[row] = text.strip()
    metric = sacrebleu.BLEU()
    score = metric.corpus_score(answers, [targets])
    return {
        "bleu": score.score,
        "signature": str(metric.get_signature()),
        "beams": beams,
        "n": len(sources),
        "params": model.parameters,
        "examples": [dict(source=sources[i], target=targets[i], answer=answers[i]) for i in (0, 100, 200)],
    }


def bits(name: str) -> dict[str, Any]:
    model = fc.load(name)
    held_out = Corpus(
        data("tinystories/sample_2mib.txt.gz"), separator="<|endoftext|>", portion=Portion(100, held_out=True)
    )
    stories = [story.strip() for story in held_out.documents()]
    before, tokenizer = find_frame(model.assets).before, whole_tokenizer(model.assets)
    nats, tokens = 0.0, 0
    length = model.config.positions
    texts = [[*before, *tokenizer.encode(story, add_special_tokens=False).ids] for story in stories]
    windows = [window for text in texts for window in windows_of(text, length)]
    for i in range(0, len(windows), _ROWS):
        ids, counted = np.zeros((_ROWS, length), np.int32), np.zeros((_ROWS, length), bool)
        for row, (window, first) in enumerate(windows[i : i + _ROWS]):
            ids[row, : len(window)] = window
            counted[row, first : len(window)] = True
        nats += float(surprise(model, jnp.asarray(ids), jnp.asarray(counted)))
        tokens += int(counted.sum())
    size = sum(len(story.encode("utf-8")) for story in stories)
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "nats_per_token": nats / tokens,
        "tokens": tokens,
        "bytes": size,
        "stories": len(stories),
        "params": model.parameters,
    }


def windows_of(ids: list[int], length: int) -> Iterator[tuple[list[int], int]]:
    """Stretches of up to `length` ids, and from which place on theirs count: each id but the first once.

    Ids of later stretches have at least half of `length` before them.
    """
    begin, known = 0, 1
    while known < len(ids):
        yield ids[begin : begin + length], known - begin
        known = min(len(ids), begin + length)
        begin = known - length // 2


def surprise(model: Any, ids: Any, counted: Any) -> Any:
    """-log p, in nats, of the ids that are counted, each after those before it."""
    logits = model(ids).logits.astype(jnp.float32)
    found = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)[..., 0]
    return -jnp.where(counted[:, 1:], found, 0.0).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bleu", "bits"))
    parser.add_argument("models", nargs="+")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {}
    for name in options.models:
        found[name] = bleu(name, options.beams) if options.what == "bleu" else bits(name)
        print(name, json.dumps(found[name], indent=2, ensure_ascii=False))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
