"""Running one command: exit codes, and errors of one line."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from flaxcompress.cli.command import PROGRAM, Ended, Failure, Verb
from flaxcompress.cli.parse import parse
from flaxcompress.cli.process import ask_for_huge_pages, give_back_memory, interruptible, keep_freed_memory, quiet

OK, FAILED, MISTAKE = 0, 1, 2
_MISTAKES = (ValueError, TypeError, OSError)  # OSError: a missing file, a full disk: what the message says helps


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 for an unexpected failure, 2 for the caller's mistake."""
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and (stream.encoding or "").lower() not in ("utf-8", "utf8"):
            stream.reconfigure(errors="replace")  # a frame's lines are not worth a failure
    try:
        verb = parse(args)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else OK
    except ValueError as error:
        _say(str(error))
        return MISTAKE
    if argv is None and verb.keeps_memory:
        keep_freed_memory()
    if argv is None and verb.saves_memory:
        give_back_memory()
    elif argv is None and verb.wants_huge_pages:
        ask_for_huge_pages()
    status = _run(verb)
    if status in (FAILED, MISTAKE):
        verb.failed(status)
    return status


def _run(verb: Verb) -> int:
    with quiet(verb.debug), interruptible():
        try:
            table = verb.run()
            _console().print(table)
            return OK
        except KeyboardInterrupt:
            hint = "; run the same command again to go on from the last checkpoint" if verb.resumes else ""
            _say(f"interrupted{hint}")
            return FAILED
        except Ended as end:
            _say(str(end))
            return end.status
        except Exception as error:
            if verb.debug:
                traceback.print_exc()
            if isinstance(error, _MISTAKES):
                _say(_message(error))
                return MISTAKE
            known = isinstance(error, Failure)
            _say(_message(error) if known else f"failed unexpectedly: {type(error).__name__}: {_message(error)}")
            if not known and not verb.debug:
                _say("this should not happen; run it again with --debug, and report the traceback")
            return FAILED


def _say(line: str) -> None:
    print(f"{PROGRAM}: {' '.join(line.split())}", file=sys.stderr)


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _console() -> Any:
    from rich.console import Console

    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=120 if wide else None)
