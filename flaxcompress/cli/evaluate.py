"""`flaxcompress evaluate`: a model measured on a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from tyro.conf import arg

from flaxcompress.cli.command import Debug, JsonFile, ModelName, Verb
from flaxcompress.cli.files import check_file, write_json

_TASKS = "fidelity|sts|classification|tokens|zero-shot|lm|translation|images"


def _option(metavar: str, text: str, name: str | None = None) -> Any:
    return arg(metavar=metavar, help=text, name=name, help_behavior_hint="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Verb):
    """Measures a model on a task, and beside it the model it was made from.

    fidelity: how close its sentence vectors are to those of --reference; on held-out docstrings of Python's standard
    library unless --data names text. sts: Spearman correlation with human scores of a tsv or jsonl file with the
    columns sentence1, sentence2 and score. classification: accuracy and F1 on a tsv or jsonl file of labelled texts.
    tokens: F1 of entities in a file with a word and its tag per line. zero-shot: accuracy of a sentence encoder that
    knows the classes' names alone. lm: perplexity and bits per byte of a causal model on text, loss and accuracy of a
    masked one. translation: BLEU and chrF of --data against --targets, or of a tsv file with both. images: accuracy on
    an npz file, or on IDX files (--data and --targets).

    For example: flaxcompress evaluate small --task fidelity --reference minilm
    """

    keeps_memory: ClassVar = True
    model: ModelName
    task: Annotated[str, arg(metavar=_TASKS, help="what to measure")]
    data: Annotated[str | None, _option("PATH", "the file to measure on")] = None
    reference: Annotated[str | None, _option("MODEL", "the original")] = None
    targets: Annotated[str | None, _option("PATH", "translation, images: translations or labels in their own file")] = (
        None
    )
    columns: Annotated[
        tuple[str, ...] | None,
        _option("COLUMN", "classification, zero-shot: those of the text(s) and the label; translation: of both texts"),
    ] = None
    labels: Annotated[
        tuple[str, ...] | None,
        _option("NAME", "classification, tokens, zero-shot: the classes' names in order, where nothing else says them"),
    ] = None
    hold_out: Annotated[
        int | None, _option("N", "the last N examples only, those that training's data/hold_out left out")
    ] = None
    separator: Annotated[
        str | None,
        _option("TEXT", "lm: what stands between documents; '' for blank lines; by default every line is one"),
    ] = None
    length: Annotated[int | None, _option("T", "lm: tokens of a window; by default the model's, 1024 at most")] = None
    mask_rate: Annotated[float | None, _option("X", "lm, masked: the share of tokens that is hidden (0.15)")] = None
    ngram: Annotated[int | None, _option("N", "lm, masked: up to so many words are hidden together (3)")] = None
    seed: Annotated[int | None, _option("N", "lm, masked: decides which tokens are hidden (0)")] = None
    beams: Annotated[int | None, _option("N", "translation: beam search with N beams (4)")] = None
    max_new_tokens: Annotated[int | None, _option("N", "translation: tokens at most")] = None
    prefix: Annotated[str | None, _option("TEXT", "translation: put before every text, as T5 wants it")] = None
    template: Annotated[str | None, _option("TEXT", "zero-shot: a text with {} for a class's name")] = None
    mean: Annotated[
        tuple[float, ...] | None, _option("X", "images: of pixels between 0 and 1; by default as the folder says")
    ] = None
    std: Annotated[tuple[float, ...] | None, _option("X", "images: their deviation")] = None
    batch_size: Annotated[int | None, _option("N", "rows computed at once", "batch")] = None
    json_file: JsonFile = None
    debug: Debug = False

    def run(self) -> Any:
        """Returns the table."""
        from flaxcompress.evaluate import evaluate, versions
        from flaxcompress.folder import load

        check_file(self.json_file)
        options = self._options()
        model = load(self.model)
        reference = None if self.reference is None else load(self.reference)
        found = evaluate(model, self.task, data=self.data, reference=reference, progress=True, **options)
        names = {"model": self.model, "reference": self.reference, "task": self.task}
        write_json(self.json_file, {**names, **found, "versions": versions()})
        return _table(self.task, self.model, found)

    def _options(self) -> dict[str, Any]:
        """The task's options that were given. Raises ValueError for those that it does not have."""
        from flaxcompress.config import closest
        from flaxcompress.evaluate import TASKS, options_of

        if self.task not in TASKS:
            raise ValueError(f"evaluate: unknown task {self.task!r}; {closest(self.task, TASKS)}")
        readers = {name: options_of(task) for name, task in TASKS.items()}
        every = dict.fromkeys(option for options in readers.values() for option in options)
        given = {name: getattr(self, name) for name in every if getattr(self, name) is not None}
        for name in given:
            if name not in readers[self.task]:
                flag = "--batch" if name == "batch_size" else f"--{name.replace('_', '-')}"
                others = ", ".join(task for task, options in readers.items() if name in options)
                raise ValueError(f"evaluate: the task {self.task!r} does not read {flag}, only: {others}")
        return given


def _table(task: str, model: str, found: Mapping[str, Any]) -> Any:
    """A line for each figure; examples and lists are left to the JSON file."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{task} of {model}"), caption=Text(f"{found['n']:,} items: {found['data']}"))
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in found.items():
        if name in ("data", "n") or isinstance(value, list):
            continue
        words = name.replace("_", " ")
        parts = value if isinstance(value, Mapping) else {}
        for part, figure in parts.items() if parts else [("", value)]:
            label = Text(f"{words.partition(' by ')[0]} of {part}" if part else words)
            table.add_row(label, Text(_shown(figure)))
    return table


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
