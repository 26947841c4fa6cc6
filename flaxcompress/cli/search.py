"""`flaxcompress search`: training runs over a space of settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import Positional, arg

from flaxcompress.cli.command import Debug, Ended, Verb, with_caption


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchVerb(Verb):
    """Searches settings of `flaxcompress train` by grid, at random, or by what earlier trials were worth (Bayesian).

    The YAML file names the training settings, the space, the metric and a folder. Given again, the same command goes on
    where the search was stopped; with more trials, it goes on searching.

    For example: flaxcompress search search.yaml trials=30
    """

    resumes: ClassVar = True
    wants_huge_pages: ClassVar = True
    config: Annotated[Path, Positional, arg(metavar="CONFIG", help="a YAML file of the search")]
    changes: Annotated[tuple[str, ...], Positional, arg(metavar="KEY=VALUE", help="settings that differ from it")] = ()
    debug: Debug = False

    def run(self) -> Any:
        """Returns the table of the trials."""
        from flaxcompress.train.loop import Stopped
        from flaxcompress.train.search import Search, search

        wanted = Search.load(self.config, self.changes)
        try:
            report = search(wanted, progress=True)
        except Stopped as stop:
            raise Ended(f"{stop}; give the same command again to go on from there", 0) from None
        best = f"{report.best.folder}: {wanted.out}/trials/{report.best.folder}/model"
        return with_caption(report.table(), f"the best is {best}; its settings are in {wanted.out}/best.yaml")
