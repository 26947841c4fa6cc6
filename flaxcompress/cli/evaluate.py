"""`flaxcompress evaluate`: a model measured on a task."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

from tyro.conf import arg

from flaxcompress.cli.command import Debug, JsonFile, ModelName, Verb
from flaxcompress.cli.files import check_file, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Verb):
    """Measures a model on a task, and beside it the model it was made from.

    fidelity: how close its sentence vectors are to those of --reference; on held-out docstrings of Python's standard
    library unless --data names text. sts: Spearman correlation with human scores of a tsv or jsonl file with the
    columns sentence1, sentence2 and score.

    For example: flaxcompress evaluate small --task fidelity --reference minilm
    """

    keeps_memory: ClassVar = True
    model: ModelName
    task: Annotated[str, arg(metavar="fidelity|sts", help="what to measure")]
    data: Annotated[str | None, arg(metavar="PATH", help="the file to measure on", help_behavior_hint="")] = None
    reference: Annotated[str | None, arg(metavar="MODEL", help="the original", help_behavior_hint="")] = None
    json_file: JsonFile = None
    debug: Debug = False

    def run(self) -> Any:
        """Returns the table."""
        from rich.table import Table
        from rich.text import Text

        from flaxcompress.config import closest
        from flaxcompress.evaluate import TASKS, evaluate, versions
        from flaxcompress.folder import load

        check_file(self.json_file)
        if self.task not in TASKS:
            raise ValueError(f"evaluate: unknown task {self.task!r}; {closest(self.task, TASKS)}")
        model = load(self.model)
        reference = None if self.reference is None else load(self.reference)
        found = evaluate(model, self.task, data=self.data, reference=reference)
        names = {"model": self.model, "reference": self.reference, "task": self.task}
        write_json(self.json_file, {**names, **found, "versions": versions()})
        table = Table(
            title=Text(f"{self.task} of {self.model}"), caption=Text(f"{found['n']:,} items: {found['data']}")
        )
        table.add_column("measure")
        table.add_column("value", justify="right")
        for name, value in found.items():
            if name not in ("data", "n"):
                table.add_row(name.replace("_", " "), "–" if value is None else f"{value:.4f}")
        return table
