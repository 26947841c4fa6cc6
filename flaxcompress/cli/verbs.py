"""The commands: a new one is a file with a `Verb` and one entry here."""

from __future__ import annotations

from flaxcompress.cli.bench import Bench
from flaxcompress.cli.command import Verb
from flaxcompress.cli.compress import Compress
from flaxcompress.cli.encode import Encode
from flaxcompress.cli.evaluate import Evaluate
from flaxcompress.cli.export import Export
from flaxcompress.cli.generate import Generate
from flaxcompress.cli.inspect import Inspect
from flaxcompress.cli.plan import Plan
from flaxcompress.cli.search import SearchVerb
from flaxcompress.cli.sensitivity import Sensitivity
from flaxcompress.cli.train import Train

VERBS: dict[str, type[Verb]] = {
    "inspect": Inspect,
    "compress": Compress,
    "sensitivity": Sensitivity,
    "train": Train,
    "search": SearchVerb,
    "evaluate": Evaluate,
    "encode": Encode,
    "generate": Generate,
    "bench": Bench,
    "export": Export,
    "plan": Plan,
}
