"""What verbs share: the types of their arguments, how they fail, the line below their table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import Positional, arg

PROGRAM = "flaxcompress"
MODEL = "a folder, a Hugging Face hub id, or minilm"

ModelName = Annotated[str, Positional, arg(metavar="MODEL", help=MODEL)]
JsonFile = Annotated[Path | None, arg(name="json", metavar="FILE", help="also writes the result to this JSON file")]
Overwrite = Annotated[bool, arg(help="replaces the output folder if it exists")]
DATA = Annotated[
    tuple[str, ...] | None,
    arg(
        metavar="FILE…",
        help="text to calibrate and heal on: txt, tsv or jsonl, each plain or .gz, FILE:COLUMN names a column",
        help_behavior_hint="(default: docstrings of Python's standard library)",
    ),
]
Debug = Annotated[bool, arg(help="shows the traceback of an error")]


class Verb:
    """A command: its fields are the arguments and flags, its docstring is the help, with an example that parses.

    `run` imports the parts of the library that it needs, so that mistyped commands answer at once.
    """

    resumes: ClassVar[bool] = False  # the same command, given again, goes on where it was interrupted
    wants_huge_pages: ClassVar[bool] = False
    keeps_memory: ClassVar[bool] = False
    debug: Debug

    @property
    def saves_memory(self) -> bool:
        """Whether freed memory goes back to the system at once."""
        return False

    def check(self) -> None:
        """Raises ValueError for settings that are no command; called while the command is parsed."""

    def failed(self, status: int) -> None:
        """Called when `run` failed and what is to be said has been said, before the process ends."""

    def run(self) -> Any:
        """Does the work; returns what is printed."""
        raise NotImplementedError


class Ended(Exception):
    """The work ended before it was done, as somebody asked; the message says how to go on.

    Attributes:
      status: the exit status.
    """

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status


class Failure(Exception):
    """Something went wrong that is not the caller's mistake, and whose message says all there is to say."""


def with_caption(table: Any, line: str) -> Any:
    """The table with one more line below it."""
    from rich.text import Text

    table.caption = Text(f"{table.caption}\n{line}" if table.caption else line)
    return table


def check_data(files: Sequence[str] | None, verb: str) -> None:
    """Raises where --data names no file, or one that does not exist: the library would take the name for a text."""
    from flaxcompress.data.readers import parse_source

    if files is not None and not files:
        raise ValueError(f"{verb}: --data names no file; give at least one, or leave it out")
    for file in files or ():
        if not parse_source(file)[0].exists():
            raise FileNotFoundError(f"{file}: no such file (--data)")
