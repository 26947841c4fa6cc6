"""`flaxcompress bench`: models compared with other runtimes."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

from tyro.conf import Positional, arg

from flaxcompress.cli.command import MODEL, Debug, JsonFile, Verb
from flaxcompress.cli.files import check_file, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench(Verb):
    """Compares speed, latency, cold start, memory and energy with other runtimes, in interleaved rounds.

    For example: flaxcompress bench minilm small --against torch --batch 8
    """

    keeps_memory: ClassVar = True
    models: Annotated[tuple[str, ...], Positional, arg(metavar="MODEL…", help=MODEL, help_behavior_hint="(required)")]
    against: Annotated[str, arg(metavar="NAMES", help="runtimes, separated by commas; known: torch")] = "torch"
    batch: Annotated[int, arg(metavar="N", help="sentences in a batch")] = 32
    length: Annotated[int, arg(metavar="T", help="tokens that sentences are padded to")] = 128
    rounds: Annotated[int, arg(metavar="N", help="how often each is timed")] = 20
    encode: Annotated[
        int, arg(metavar="N", help="also encodes this many sentences, against sentence-transformers; 0 for none")
    ] = 0
    seed: Annotated[int, arg(metavar="N", help="of the random tokens")] = 0
    json_file: JsonFile = None
    debug: Debug = False

    def check(self) -> None:
        """Raises ValueError without a model: a positional of any number may be empty."""
        if not self.models:
            raise ValueError("no MODEL is given")

    def run(self) -> Any:
        """Returns the table."""
        from flaxcompress.bench import bench

        check_file(self.json_file)
        against = [name.strip() for name in self.against.split(",") if name.strip()]
        found = bench(
            self.models,
            against=against,
            batch=self.batch,
            length=self.length,
            rounds=self.rounds,
            encode=self.encode,
            seed=self.seed,
            progress=True,
        )
        write_json(self.json_file, found.to_json())
        return found.table()
