"""The command `flaxcompress`: a thin shell over the library's functions."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from flaxcompress.model import Model

# The parts of the library that a verb needs are imported when it runs, so that mistyped commands answer at once.

PROGRAM = "flaxcompress"
OK, FAILED, MISTAKE = 0, 1, 2
_MISTAKES = (ValueError, TypeError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
_NOISY = ("jax", "absl", "orbax", "transformers", "sentence_transformers", "huggingface_hub", "matplotlib")
_MODEL = "a folder, a Hugging Face hub id, or minilm"

ModelName = Annotated[str, Positional, arg(metavar="MODEL", help=_MODEL)]
JsonFile = Annotated[Path | None, arg(name="json", metavar="FILE", help="also writes the result to this JSON file")]
Overwrite = Annotated[bool, arg(help="replaces the output folder if it exists")]
Debug = Annotated[bool, arg(help="shows the traceback of an error")]


class Failure(Exception):
    """Something went wrong that is not the caller's mistake, and whose message says all there is to say."""


# ── the verbs ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
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

        _check_file(self.json_file)
        model = load(self.model)
        found = profile(model, length=min(128, model.config.positions))
        _write_json(self.json_file, found.to_json())
        return found.table()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compress:
    """Makes a model smaller by a recipe, and writes it as a folder that also loads in PyTorch.

    A run that was interrupted goes on from its last checkpoint when the same command is given again.

    For example: flaxcompress compress minilm --recipe balanced --out small
    """

    model: ModelName
    out: Annotated[Path, arg(metavar="DIR", help="the folder to write")]
    recipe: Annotated[str, arg(metavar="NAME|FILE", help="light, balanced, small, tiny, nano or a YAML file")] = (
        "balanced"
    )
    target: Annotated[str | None, arg(metavar="8x|10MB", help="adjusts the recipe to reach this size")] = None
    data: Annotated[
        tuple[str, ...] | None,
        arg(
            metavar="FILE…",
            help="text to calibrate and heal on: txt, tsv or jsonl, each plain or .gz, FILE:COLUMN names a column",
            help_behavior_hint="(default: docstrings of Python's standard library)",
        ),
    ] = None
    heal_steps: Annotated[
        int | None, arg(metavar="N", help="steps of healing, 0 for none", help_behavior_hint="(default: the recipe's)")
    ] = None
    dry_run: Annotated[bool, arg(help="shows the plan and its sizes, and writes nothing")] = False
    overwrite: Overwrite = False
    seed: Annotated[int, arg(metavar="N", help="of everything random")] = 0
    debug: Debug = False

    def run(self) -> Any:
        """Returns the report's table, or the plan's."""
        import jax

        from flaxcompress import storage
        from flaxcompress.compress.recipe import Recipe
        from flaxcompress.compress.run import compress
        from flaxcompress.folder import load, save

        out = _folder(self.out)
        storage.check_output(out, overwrite=self.overwrite)
        _check_data(self.data)
        model = load(self.model)
        recipe = Recipe.load(self.recipe)
        if self.target is not None:
            recipe = recipe.with_target(self.target, model)
        if self.heal_steps is not None:
            recipe = recipe.with_heal_steps(self.heal_steps)
        if self.dry_run:
            return recipe.plan(model).table()
        work = work_folder(out)
        small, report = compress(
            model,
            recipe,
            calibration=None if self.data is None else list(self.data),
            key=jax.random.key(self.seed),
            work=work,
            progress=True,
        )
        check = _PyTorchCheck(small, out)
        save(small, out, report=report, overwrite=self.overwrite, check=check)
        shutil.rmtree(work, ignore_errors=True)
        table = report.table()
        return _with_caption(table, f"written to {self.out}; {check.outcome}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measures a model on a task, and beside it the model it was made from.

    fidelity: how close its sentence vectors are to those of --reference; on held-out docstrings of Python's standard
    library unless --data names text. sts: Spearman correlation with human scores of a tsv or jsonl file with the
    columns sentence1, sentence2 and score.

    For example: flaxcompress evaluate small --task fidelity --reference minilm
    """

    model: ModelName
    task: Annotated[str, arg(metavar="fidelity|sts", help="what to measure")]
    data: Annotated[str | None, arg(metavar="PATH", help="the file to measure on", help_behavior_hint="")] = None
    reference: Annotated[str | None, arg(metavar="MODEL", help="the original", help_behavior_hint="")] = None
    json_file: JsonFile = None
    debug: Debug = False

    def run(self) -> Any:
        """Returns the table."""
        from rich.table import Table
        from rich.text import Text

        from flaxcompress.config import closest
        from flaxcompress.evaluate import TASKS, evaluate, versions
        from flaxcompress.folder import load

        _check_file(self.json_file)
        if self.task not in TASKS:
            raise ValueError(f"evaluate: unknown task {self.task!r}; {closest(self.task, TASKS)}")
        model = load(self.model)
        reference = None if self.reference is None else load(self.reference)
        found = evaluate(model, self.task, data=self.data, reference=reference)
        names = {"model": self.model, "reference": self.reference, "task": self.task}
        _write_json(self.json_file, {**names, **found, "versions": versions()})
        table = Table(
            title=Text(f"{self.task} of {self.model}"), caption=Text(f"{found['n']:,} items: {found['data']}")
        )
        table.add_column("measure")
        table.add_column("value", justify="right")
        for name, value in found.items():
            if name not in ("data", "n"):
                table.add_row(name.replace("_", " "), "–" if value is None else f"{value:.4f}")
        return table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encode:
    """Turns sentences into vectors: one row of a .npy file for each sentence, in their order.

    Blank lines are left out. A .tsv or .jsonl file gives one column's texts (FILE:COLUMN names it), and any file may be
    gzip (.gz).

    For example: echo "A sentence." | flaxcompress encode minilm --out vectors.npy
    """

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

        _check_file(self.out)
        _check_file(self.json_file)
        name, texts = _sentences(self.file)
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
        _write_json(self.json_file, found)
        table = Table(title=Text(f"{name}, encoded by {self.model}"))
        for header in ("sentences", "width", "seconds", "per second"):
            table.add_column(header, justify="right")
        table.add_column("written to")
        rate = f"{shape[0] / max(seconds, 1e-9):,.0f}"
        table.add_row(f"{shape[0]:,}", f"{shape[1]:,}", f"{seconds:.2f}", rate, Text(str(self.out)))
        return table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Compares speed, latency, cold start, memory and energy with other runtimes, in interleaved rounds.

    For example: flaxcompress bench minilm small --against torch --batch 8
    """

    models: Annotated[tuple[str, ...], Positional, arg(metavar="MODEL…", help=_MODEL, help_behavior_hint="(required)")]
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

    def run(self) -> Any:
        """Returns the table."""
        from flaxcompress.bench import bench

        _check_file(self.json_file)
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
        _write_json(self.json_file, found.to_json())
        return found.table()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Writes a model in another tool's format.

    torch-dense: every matrix multiplied back, a folder that stock transformers loads.

    For example: flaxcompress export small --format torch-dense --out small-dense
    """

    model: Annotated[str, Positional, arg(metavar="DIR", help=f"the model to export: {_MODEL}")]
    format: Annotated[str, arg(metavar="torch-dense", help="the format to write")]
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

        out, start = _folder(self.out), time.perf_counter()
        storage.check_output(out, overwrite=self.overwrite)
        if self.format not in FORMATS:
            raise ValueError(f"export: unknown format {self.format!r}; {closest(self.format, FORMATS)}")
        before = sum(file.stat().st_size for file in storage.weight_files(resolve(self.model)))
        model = load(self.model)
        check = _PyTorchCheck(model, out)
        with storage.new_folder(out, overwrite=self.overwrite) as folder:
            export(model, folder, format=self.format, overwrite=True)  # replaces the empty folder
            check(folder)
            after = sum(file.stat().st_size for file in storage.weight_files(folder))
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
        return _with_caption(table, check.outcome)


VERBS: dict[str, type] = {
    "inspect": Inspect,
    "compress": Compress,
    "evaluate": Evaluate,
    "encode": Encode,
    "bench": Bench,
    "export": Export,
}


def work_folder(out: Path) -> Path:
    """Where a compression into `out` keeps its checkpoints: a hidden sibling, removed at the end."""
    return out.parent / f".{out.name}.work"


class _PyTorchCheck:
    """Called on a folder before it is moved into place: it must compute in PyTorch what the model computes here."""

    def __init__(self, model: Model, out: Path):
        self._model, self._out = model, out
        self.difference: float | None = None

    def __call__(self, folder: Path) -> None:
        from flaxcompress.export.torch import check_folder

        try:
            self.difference = check_folder(self._model, folder)
        except ValueError as error:
            message = str(error).replace(str(folder), str(self._out))
            raise Failure(f"{message}; nothing was written") from error

    @property
    def outcome(self) -> str:
        if self.difference is None:
            return "not checked in PyTorch, which is not installed"
        return f"PyTorch agrees within {self.difference:.0e}"


def _with_caption(table: Any, line: str) -> Any:
    from rich.text import Text

    table.caption = Text(f"{table.caption}\n{line}" if table.caption else line)
    return table


# ── reading and writing ──────────────────────────────────────────────────────────────────────────────────────────────


def _folder(path: Path) -> Path:
    """An absolute path, so that `--out .` and `--out x/..` have a name and a parent."""
    return Path(os.path.abspath(path))


def _check_data(files: Sequence[str] | None) -> None:
    """Raises where --data names no file, or one that does not exist: the library would take the name for a text."""
    from flaxcompress.data.readers import parse_source

    if files is not None and not files:
        raise ValueError("compress: --data names no file; give at least one, or leave it out")
    for file in files or ():
        if not parse_source(file)[0].exists():
            raise FileNotFoundError(f"{file}: no such file (--data)")


def _check_file(path: Path | None) -> None:
    """Raises ValueError when a file cannot be written there, before hours of work and not after."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: {path.parent} is no folder; create it first")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"{path}: {path.parent} cannot be written to; choose another place")


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[IO[bytes]]:
    """A temporary sibling that replaces `path` when the block ends well, and vanishes when it does not."""
    _check_file(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from None
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error}); nothing was changed") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _write_json(path: Path | None, data: Mapping[str, Any]) -> None:
    if path is not None:
        with _new_file(path) as file:
            file.write((json.dumps(data, indent=2) + "\n").encode())


def write_vectors(path: Path, parts: Iterator[Any], name: str) -> tuple[int, int]:
    """Writes arrays [n, D] one after the other as one .npy file [N, D], in bounded memory; returns (N, D).

    Raises ValueError when there are none, or the file cannot be written.
    """
    import numpy as np

    rows, width, header = 0, 0, 0
    with _new_file(path) as file:
        for part in parts:
            if not rows:
                width = part.shape[1]
                _npy_header(file, 0, width)
                header = file.tell()
            file.write(np.ascontiguousarray(part, np.float32).data)
            rows += len(part)
        if not rows:
            raise ValueError(f"{name}: holds no sentences")
        file.seek(0)
        _npy_header(file, rows, width)  # as long as before: numpy leaves room for the first axis to grow
        assert file.tell() == header
    return rows, width


def _npy_header(file: IO[bytes], rows: int, width: int) -> None:
    import numpy as np

    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, width)})


def _sentences(file: str | None) -> tuple[str, Iterator[str]]:
    if file not in (None, "-"):
        from flaxcompress.data.calibration import source_name
        from flaxcompress.data.readers import read_texts

        return source_name([file]), read_texts(file)
    if sys.stdin.isatty():
        print("Type sentences, one on a line; Ctrl-D ends them.", file=sys.stderr)
    return "standard input", _lines(sys.stdin.buffer)


def _lines(file: IO[bytes]) -> Iterator[str]:
    for number, raw in enumerate(file, 1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"standard input, line {number}: not valid UTF-8 (byte 0x{raw[error.start]:02x}); convert it, for "
                "example with iconv"
            ) from None
        line = (line.removeprefix("\ufeff") if number == 1 else line).rstrip("\r\n")
        if line.strip():
            yield line


# ── running a verb ───────────────────────────────────────────────────────────────────────────────────────────────────


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 for an unexpected failure, 2 for the caller's mistake."""
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and (stream.encoding or "").lower() not in ("utf-8", "utf8"):
            stream.reconfigure(errors="replace")  # a frame's lines are not worth a failure
    try:
        verb = _parse(args)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else OK
    except ValueError as error:
        _say(str(error))
        return MISTAKE
    if argv is None and isinstance(verb, Compress):
        _ask_for_huge_pages()
    with _quiet(verb.debug), _interruptible():
        try:
            table = verb.run()
            _console().print(table)
            return OK
        except KeyboardInterrupt:
            resumes = isinstance(verb, Compress)
            _say("interrupted" + ("; run the same command again to go on from the last checkpoint" if resumes else ""))
            return FAILED
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


def _ask_for_huge_pages() -> None:
    """Starts this process over with huge pages for large allocations, where Linux gives them only to who asks.

    XLA's temporary buffers are mapped anew at every step; in small pages the faults take two fifths of a healing step
    (1.25 s against 0.74 s, measured on two cores). glibc reads the setting only when a process starts.
    """
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    with contextlib.suppress(OSError):
        if "GLIBC_TUNABLES" in os.environ or "[madvise]" not in switch.read_text():
            return
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


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


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM is treated like Ctrl-C."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: leave signals to whoever owns it
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Our own warnings as one line each on stderr; other libraries' chatter only with --debug."""
    if not debug:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's; read when JAX is imported
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    ours, silent, root = logging.getLogger(PROGRAM), logging.NullHandler(), logging.getLogger()
    levels = {} if debug else {name: logging.getLogger(name).level for name in _NOISY}
    propagate, ours.propagate = ours.propagate, debug
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            root.addHandler(silent)  # without any handler, Python prints warnings to stderr by itself
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        ours.addHandler(handler)
        try:
            yield
        finally:
            ours.removeHandler(handler)
            ours.propagate = propagate
            root.removeHandler(silent)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{PROGRAM}: {record.levelname.lower()}: {' '.join(record.getMessage().split())}"


# ── parsing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _parse(args: list[str]) -> Any:
    """The verb with its settings. Raises ValueError with one line for a wrong command, SystemExit after --help."""
    if not args:
        raise ValueError(f"no command; known: {', '.join(VERBS)} (see {PROGRAM} --help)")
    _check_names(args)
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
        name = args[0] if args[0] in VERBS else ""
        where, command = (f"{name}: ", f"{PROGRAM} {name}") if name else ("", PROGRAM)
        raise ValueError(f"{where}{_plain(complaint.getvalue())} (see {command} --help)") from None
    if isinstance(verb, Bench) and not verb.models:
        raise ValueError(f"bench: no MODEL is given (see {PROGRAM} bench --help)")
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
    positional = {"model", "models", "file"}
    names = {"json_file": "json"}
    fields = [field.name for field in dataclasses.fields(verb) if field.name not in positional]
    return ["--" + names.get(name, name).replace("_", "-") for name in fields]


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
