"""From a command's words to a verb, or to one line that says what is wrong with them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import typing
from collections.abc import Sequence

import tyro

from flaxcompress.cli.command import PROGRAM, Verb
from flaxcompress.cli.verbs import VERBS


def parse(args: list[str]) -> Verb:
    """The verb with its settings. Raises ValueError with one line for a wrong command, SystemExit after --help."""
    if not args:
        raise ValueError(f"no command; known: {', '.join(VERBS)} (see {PROGRAM} --help)")
    _check_names(args)
    name = args[0] if args[0] in VERBS else ""
    where, command = (f"{name}: ", f"{PROGRAM} {name}") if name else ("", PROGRAM)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            verb = tyro.extras.subcommand_cli_from_dict(
                VERBS,
                prog=PROGRAM,
                description="Makes transformers smaller and faster in JAX, and hands them back to PyTorch.\n\n"
                f"For example: {PROGRAM} compress minilm --out small",
                args=args,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(f"{where}{_plain(complaint.getvalue())} (see {command} --help)") from None
    try:
        verb.check()
    except ValueError as error:
        raise ValueError(f"{where}{error} (see {command} --help)") from None
    return verb


def _check_names(args: Sequence[str]) -> None:
    """Unknown verbs and flags, with the closest that exists."""
    if args[0].startswith("-"):
        known, given = ["--help", "-h"], args[:1]
    elif args[0] in VERBS:
        known, given = ["--help", "-h", *_flags(VERBS[args[0]])], args[1:]
    else:
        from flaxcompress.config import closest

        raise ValueError(f"unknown command {args[0]!r}; {closest(args[0], VERBS)}")
    for token in given:
        if token == "--":
            break
        flag = token.partition("=")[0].replace("_", "-")
        if re.match(r"--?[A-Za-z]", flag) and flag not in known and not flag.startswith("--tyro-"):
            from flaxcompress.config import closest

            where = f"{args[0]}: " if args[0] in VERBS else ""
            raise ValueError(f"{where}unknown flag {flag!r}; {closest(flag, (k for k in known if k != '-h'))}")


def _flags(verb: type) -> list[str]:
    """The flags that tyro makes of a verb's fields, by what their annotations say."""
    hints, flags = typing.get_type_hints(verb, include_extras=True), []
    for field in dataclasses.fields(verb):
        extras = getattr(hints[field.name], "__metadata__", ())
        if tyro.conf.Positional not in extras:
            name = next((extra.name for extra in extras if getattr(extra, "name", None)), field.name)
            flags.append("--" + name.replace("_", "-"))
    return flags


def _plain(boxed: str) -> str:
    """tyro's complaint as one line: the text between its title and the next rule, without the frame."""
    framed = boxed.lstrip().startswith("╭")  # the title is in the frame then; in ASCII a rule follows it
    sections: list[list[str]] = [[]]
    for line in boxed.splitlines():
        text = line.strip().strip("│").strip()
        if text and set(text) <= set("─-"):
            sections.append([])
        elif not text.startswith(("╭", "╰")):
            sections[-1] += text.split()
    words = sections[0] if framed or len(sections) == 1 else sections[1]
    line = " ".join(words).partition(" Got errors:")[0].rstrip(".")
    line = re.sub(rf"^Missing from {PROGRAM}[\w -]*:", "missing:", line)
    line = re.sub(
        r"^Error parsing (\S+): no type matching (\S+) could be instantiated from \[(.*)\]", r"\1: \3 is no \2", line
    )
    return line or "the command was not understood"
