"""`flaxcompress sensitivity`: what each matrix loses by rank and bits, to choose a ratio by."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import arg

from flaxcompress.cli.command import DATA, Debug, ModelName, Overwrite, Verb, check_data, with_caption
from flaxcompress.cli.files import absolute


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sensitivity(Verb):
    """Predicts what every matrix loses alone, by bits and by rank, and what the best choice of all loses by size.

    Writes report.json, and report.html with heat maps and a plot of size against loss, with the recipes on it as they
    measure before healing.

    For example: flaxcompress sensitivity minilm --out minds
    """

    wants_huge_pages: ClassVar = True
    model: ModelName
    out: Annotated[Path, arg(metavar="DIR", help="the folder to write")]
    data: DATA = None
    recipes: Annotated[
        tuple[str, ...], arg(metavar="NAME|FILE…", help="recipes to measure beside it; none: leave them out")
    ] = ("light", "balanced", "small")
    statistics: Annotated[Path | None, arg(metavar="DIR", help="keeps statistics there, for other runs")] = None
    overwrite: Overwrite = False
    seed: Annotated[int, arg(metavar="N", help="of everything random")] = 0
    debug: Debug = False

    def run(self) -> Any:
        """Returns the table."""
        import jax

        from flaxcompress import storage
        from flaxcompress.compress.curves import sensitivity_curves
        from flaxcompress.compress.recipe import Recipe
        from flaxcompress.compress.run import calibrated
        from flaxcompress.data import calibration_text
        from flaxcompress.folder import load

        out = absolute(self.out)
        storage.check_output(out, overwrite=self.overwrite)
        check_data(self.data, "sensitivity")
        model = load(self.model)
        for name in self.recipes:
            Recipe.load(name).plan(model)
        if not model.assets.has_tokenizer:
            raise ValueError("sensitivity: the checkpoint has no tokenizer, so nothing can be calibrated")
        text = calibration_text(None if self.data is None else list(self.data))
        calibration = calibrated(model, text, Recipe([]).scrambled, statistics=self.statistics)
        key = jax.random.key(self.seed)
        curves = sensitivity_curves(model, calibration, recipes=self.recipes, key=key, progress=True)
        with storage.new_folder(out, overwrite=self.overwrite) as part:
            (part / "report.json").write_text(json.dumps(curves.to_json(), indent=2) + "\n", "utf-8")
            (part / "report.html").write_text(curves.to_html(), "utf-8")
        return with_caption(curves.summary(), f"written to {self.out}; report.html has the heat maps")
