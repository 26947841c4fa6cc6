"""`flaxcompress export`: a model in another tool's format."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from flaxcompress.cli.command import MODEL, Debug, Overwrite, Verb, with_caption
from flaxcompress.cli.files import absolute
from flaxcompress.cli.torch_check import PyTorchCheck


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Verb):
    """Writes a model in another tool's format.

    torch-dense: every matrix multiplied back, a folder that stock transformers loads.
    peft: the adapters alone, a folder that PeftModel.from_pretrained loads on the original model.

    For example: flaxcompress export small --format torch-dense --out small-dense
    """

    model: Annotated[str, Positional, arg(metavar="DIR", help=f"the model to export: {MODEL}")]
    format: Annotated[str, arg(metavar="torch-dense|peft", help="the format to write")]
    out: Annotated[Path, arg(metavar="DIR", help="the folder to write")]
    overwrite: Overwrite = False
    debug: Debug = False

    def run(self) -> Any:
        """Returns the table."""
        from rich.table import Table
        from rich.text import Text

        from flaxcompress import storage
        from flaxcompress.config import closest
        from flaxcompress.evaluate.report import versions
        from flaxcompress.export import FORMATS, export
        from flaxcompress.folder import load, resolve

        out, start = absolute(self.out), time.perf_counter()
        storage.check_output(out, overwrite=self.overwrite)
        if self.format not in FORMATS:
            raise ValueError(f"export: unknown format {self.format!r}; {closest(self.format, FORMATS)}")
        before = sum(file.stat().st_size for file in storage.weight_files(resolve(self.model)))
        model = load(self.model)
        check = PyTorchCheck(model, out)
        with storage.new_folder(out, overwrite=self.overwrite) as folder:
            export(model, folder, format=self.format, overwrite=True)  # replaces the empty folder
            if (folder / "config.json").exists():  # a whole model, not an adapter for one
                check(folder)
            after = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            report = {
                "source": self.model,
                "format": self.format,
                "bytes": {"before": before, "after": after},
                "torch_difference": check.difference,
                "seconds": time.perf_counter() - start,
                "versions": versions(),
            }
            storage.write_files(folder, {"report.json": json.dumps(report, indent=2) + "\n"})
        table = Table(title=Text(f"{self.model} as {self.format}"))
        for header in ("MB before", "MB after"):
            table.add_column(header, justify="right")
        table.add_column("written to")
        table.add_row(f"{before / 1e6:,.2f}", f"{after / 1e6:,.2f}", Text(str(self.out)))
        outcome = "an adapter, for the model it was made on" if self.format == "peft" else check.outcome
        return with_caption(table, outcome)
