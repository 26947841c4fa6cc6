"""`flaxcompress inspect`: what a model consists of."""

from __future__ import annotations

import dataclasses
from typing import Any

from flaxcompress.cli.command import Debug, JsonFile, ModelName, Verb
from flaxcompress.cli.files import check_file, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect(Verb):
    """Shows parameters, bytes and FLOPs per token of a model, part by part.

    For example: flaxcompress inspect minilm
    """

    model: ModelName
    json_file: JsonFile = None
    debug: Debug = False

    def run(self) -> Any:
        """Returns the table."""
        from flaxcompress.evaluate.profile import profile
        from flaxcompress.folder import load

        check_file(self.json_file)
        model = load(self.model)
        found = profile(model, length=min(128, model.config.positions))
        write_json(self.json_file, found.to_json())
        return found.table()
