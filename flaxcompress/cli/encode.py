"""`flaxcompress encode`: sentences turned into vectors."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import Positional, arg

from flaxcompress.cli.command import Debug, JsonFile, ModelName, Verb
from flaxcompress.cli.files import check_file, sentences, write_json, write_vectors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encode(Verb):
    """Turns sentences into vectors: one row of a .npy file for each sentence, in their order.

    Blank lines are left out. A .tsv or .jsonl file gives one column's texts (FILE:COLUMN names it), and any file may be
    gzip (.gz).

    For example: echo "A sentence." | flaxcompress encode minilm --out vectors.npy
    """

    keeps_memory: ClassVar = True
    model: ModelName
    file: Annotated[
        str | None,
        Positional,
        arg(metavar="FILE", help="sentences, one on a line", help_behavior_hint="(default: stdin)"),
    ] = None
    out: Annotated[Path, arg(metavar="FILE", help="the .npy file to write, replaced if it exists")] = Path(
        "vectors.npy"
    )
    batch: Annotated[int, arg(metavar="N", help="sentences encoded at once")] = 32
    json_file: JsonFile = None
    debug: Debug = False

    def run(self) -> Any:
        """Returns the table."""
        from rich.table import Table
        from rich.text import Text

        from flaxcompress.evaluate.report import versions
        from flaxcompress.folder import load

        check_file(self.out)
        check_file(self.json_file)
        name, texts = sentences(self.file)
        model = load(self.model)
        start = time.perf_counter()
        shape = write_vectors(self.out, model.encode_stream(texts, batch_size=self.batch, progress=True), name)
        seconds = time.perf_counter() - start
        found = {
            "model": self.model,
            "data": name,
            "out": str(self.out),
            "n": shape[0],
            "width": shape[1],
            "seconds": seconds,
            "versions": versions(),
        }
        write_json(self.json_file, found)
        table = Table(title=Text(f"{name}, encoded by {self.model}"))
        for header in ("sentences", "width", "seconds", "per second"):
            table.add_column(header, justify="right")
        table.add_column("written to")
        rate = f"{shape[0] / max(seconds, 1e-9):,.0f}"
        table.add_row(f"{shape[0]:,}", f"{shape[1]:,}", f"{seconds:.2f}", rate, Text(str(self.out)))
        return table
