"""Interleaved comparisons with other runtimes: throughput, latency, cold start, memory, energy.

Every contestant gets the same ids and mask, and every round times each of them once, so that what else the machine does
falls on all alike; what is reported is the median of the ratios within a round. Cold start and peak memory are taken in
a process of each contestant's own. This file also runs as the script of those processes (`python -P bench.py '{…}'`),
which is why nothing heavy is imported at its top: PyTorch's process must not pay for JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from flaxcompress.model import Model

RIVALS = {"torch": ("torch", "transformers")}  # name: the packages that it needs
_INSTALL = "pip install 'flaxcompress[torch]'"
_OWN = "flaxcompress"
_LATENCY_LENGTH = 32  # tokens of the batch-1 call: a sentence
_LATENCY_CALLS = 5  # per round
_PAUSE = 0.02  # seconds between contestants: OpenMP's threads spin for a while after PyTorch's work is done
_POWER = Path("/sys/class/powercap")
_PROBE_SECONDS = 600


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """What was measured of one model in one runtime.

    Attributes:
      runtime: "flaxcompress" or a rival.
      median_ms: of a forward pass of the whole batch, compile excluded.
      tokens_per_second: B·T over the median, padding counted.
      speed: {"median", "q1", "q3"} of baseline time over own time, round by round; above 1 is faster than the baseline.
      latency_p50_ms, latency_p95_ms: of one sentence of `BenchResult.latency_length` tokens.
      import_seconds, load_seconds, first_call_seconds: in a process of its own; the first call is where we compile.
      peak_bytes: the most resident memory that process had, runtime included.
      bytes: of the weights on disk.
      joules_per_1000: energy of the processor for 1,000 sentences; None where the machine does not tell.
      difference: the largest difference between its last hidden states at real tokens and those of the same model in
        flaxcompress; None for flaxcompress itself.
    """

    model: str
    runtime: str
    median_ms: float
    tokens_per_second: float
    speed: dict[str, float]
    latency_p50_ms: float
    latency_p95_ms: float
    import_seconds: float
    load_seconds: float
    first_call_seconds: float
    peak_bytes: int
    bytes: int
    joules_per_1000: float | None = None
    difference: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeResult:
    """`Model.encode` against sentence-transformers' `encode` on the same sentences, tokenizing included.

    Attributes:
      median_seconds, rival_median_seconds: for all `n` sentences.
      speed: {"median", "q1", "q3"} of the rival's time over ours, round by round; above 1, ours is faster.
      first_seconds: our first pass, compiling included; it is not among the rounds.
      difference: the largest difference between two components of the vectors.
    """

    model: str
    n: int
    rounds: int
    median_seconds: float
    rival_median_seconds: float
    speed: dict[str, float]
    first_seconds: float
    difference: float

    @property
    def sentences_per_second(self) -> float:
        """Ours."""
        return self.n / self.median_seconds

    @property
    def rival_sentences_per_second(self) -> float:
        """sentence-transformers'."""
        return self.n / self.rival_median_seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchResult:
    """All contestants, the first of which that is a rival being the baseline (the first of all where none is)."""

    batch: int
    length: int
    rounds: int
    latency_length: int
    threads: int
    device: str
    baseline: str
    contestants: tuple[Contestant, ...]
    encode: tuple[EncodeResult, ...] = ()
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field."""
        return dataclasses.asdict(self)

    def table(self):
        """A `rich.table.Table`: a column for each contestant."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(f"{self.batch}×{self.length} tokens, {self.rounds} rounds, {self.threads} threads"))
        table.add_column("")
        for one in self.contestants:
            table.add_column(Text(f"{one.model}\n{one.runtime}"), justify="right")

        def row(label: str, show: Any) -> None:
            table.add_row(Text(label), *(Text(show(one)) for one in self.contestants))

        row("forward, median ms", lambda one: f"{one.median_ms:.2f}")
        row("tokens per second", lambda one: f"{one.tokens_per_second:,.0f}")
        row(f"speed relative to {self.baseline}", lambda one: _spread(one.speed))
        table.add_section()
        row(
            f"batch 1, {self.latency_length} tokens: p50 / p95 ms",
            lambda one: f"{one.latency_p50_ms:.2f} / {one.latency_p95_ms:.2f}",
        )
        row("cold start: import + load, s", lambda one: f"{one.import_seconds:.2f} + {one.load_seconds:.2f}")
        row("first call (compiling), s", lambda one: f"{one.first_call_seconds:.2f}")
        row("peak memory, MB", lambda one: f"{one.peak_bytes / 1e6:,.0f}")
        row("weights on disk, MB", lambda one: f"{one.bytes / 1e6:,.2f}")
        row("joules per 1,000 sentences", lambda one: _optional(one.joules_per_1000, "{:.1f}"))
        row("difference from flaxcompress", lambda one: _optional(one.difference, "{:.1e}"))
        for found in self.encode:
            table.add_section()
            table.add_row(Text(f"encode {found.n:,} sentences, per s"), *self._encode_cells(found))
        if self.notes:
            table.caption = Text("\n".join(self.notes))
        return table

    def _encode_cells(self, found: EncodeResult) -> Iterator[str]:
        for one in self.contestants:
            if one.model != found.model:
                yield ""
            elif one.runtime == _OWN:
                yield f"{found.sentences_per_second:,.0f}\n{_spread(found.speed)} of the rival's"
            else:
                yield f"{found.rival_sentences_per_second:,.0f}"


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.3f} [{values['q1']:.3f}, {values['q3']:.3f}]"


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


# ── the comparison ───────────────────────────────────────────────────────────────────────────────────────────────────


def bench(
    models: Sequence[str | Path],
    *,
    against: Sequence[str] = ("torch",),
    batch: int = 32,
    length: int = 128,
    rounds: int = 20,
    encode: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> BenchResult:
    """Times the forward pass of models against other runtimes on the same ids and mask.

    In PyTorch a Hugging Face folder runs as the stock model with SDPA attention, a folder of ours as its own
    modeling_flaxcompress.py. A runtime that is not installed is left out, with a note that says how to install it.

    Args:
      models: folders, hub ids or "minilm".
      against: rivals, of `RIVALS`.
      batch: B, sentences in the batch; their lengths lie between T/2 and T, padded to T.
      length: T.
      rounds: how often every contestant is timed.
      encode: also compares `Model.encode` with sentence-transformers on this many of Python's docstring sentences.
      seed: of the random ids and lengths.

    Raises:
      ValueError: no models, an unknown rival, sizes below 1, more tokens than a model has positions.
      FileNotFoundError: no such model.
      RuntimeError: the process that takes cold start and memory failed.
    """
    from flaxcompress import storage
    from flaxcompress.folder import resolve

    _check_arguments(models, against, batch=batch, length=length, rounds=rounds, encode=encode)
    present, notes = _installed(against)
    busy, cores = os.getloadavg()[0], _cores()
    if busy > cores / 2:
        notes.append(f"the machine was busy (load {busy:.1f} on {cores} cores): measure again when it is idle")
    folders = {str(name): resolve(name) for name in models}
    own = {name: _Flax(folder) for name, folder in folders.items()}
    vocabulary = min(one.model.config.vocabulary for one in own.values())
    for name, one in own.items():
        if length > one.model.config.positions:
            raise ValueError(
                f"bench: {name} has {one.model.config.positions} positions, so a length of {length} does not fit; "
                f"add --length {one.model.config.positions}"
            )
    shapes = {"batch": batch, "length": length, "vocabulary": vocabulary, "seed": seed}
    who = [(name, _OWN) for name in folders] + [(name, rival) for rival in present for name in folders]
    baseline = next((i for i, (_, runtime) in enumerate(who) if runtime != _OWN), 0)
    with _bar(progress, "bench", 2 * len(who) + rounds) as advance:
        cold = []
        for name, runtime in who:
            cold.append(_in_process_of_its_own(runtime, folders[name], shapes))
            advance(note=f"{name}, cold start")
        with _torch_threads(bool(present)) as threads:
            runners = [own[name] if runtime == _OWN else _Torch(folders[name]) for name, runtime in who]
            full, single = make_batch(**shapes), _single(vocabulary, length, seed)
            inputs = [(runner.prepare(*full), runner.prepare(*single)) for runner in runners]
            states = []
            for runner, (many, one) in zip(runners, inputs, strict=True):
                for _ in range(2):  # compile, then let caches and thread pools settle
                    runner(many)
                    runner(one)
                states.append(runner.states(many))
                advance(note="warm-up")
            timed = _rounds(runners, inputs, rounds, advance)
    contestants = []
    for i, (name, runtime) in enumerate(who):
        seconds = np.array(timed.forward[i])
        reference = states[who.index((name, _OWN))]
        contestants.append(
            Contestant(
                model=name,
                runtime=runtime,
                median_ms=float(np.median(seconds)) * 1e3,
                tokens_per_second=batch * length / float(np.median(seconds)),
                speed=_quartiles(np.array(timed.forward[baseline]) / seconds),
                latency_p50_ms=float(np.percentile(timed.single[i], 50)) * 1e3,
                latency_p95_ms=float(np.percentile(timed.single[i], 95)) * 1e3,
                **cold[i],
                bytes=sum(file.stat().st_size for file in storage.weight_files(folders[name])),
                joules_per_1000=None if timed.joules is None else timed.joules[i] / (rounds * batch) * 1000,
                difference=None if runtime == _OWN else float(np.abs(states[i] - reference)[full[1]].max()),
            )
        )
    encoded, more = _encode_all(folders, own, encode, rounds, progress)
    if any(one.joules_per_1000 is None for one in contestants):
        notes.append("energy: this machine does not let it be read")
    return BenchResult(
        batch=batch,
        length=length,
        rounds=rounds,
        latency_length=single[0].shape[1],
        threads=threads,
        device=own[next(iter(own))].device,
        baseline=" ".join(who[baseline]),
        contestants=tuple(contestants),
        encode=encoded,
        notes=(*notes, *more),
        versions=_versions(),
    )


def bench_encode(
    model: Model,
    reference_folder: str | Path,
    sentences: Sequence[str],
    rounds: int = 5,
    *,
    name: str = "",
    batch_size: int = 32,
    progress: bool = False,
) -> EncodeResult:
    """Times `Model.encode` against sentence-transformers' `encode` of `reference_folder`, interleaved, warm.

    Args:
      sentences: what both encode, in batches of `batch_size`.
      rounds: how often each encodes all of them; one more pass of each comes first and is not counted.

    Raises:
      ValueError: no sentences, or rounds below 1.
      ImportError: sentence-transformers is not installed.
    """
    if not sentences or rounds < 1:
        raise ValueError(f"bench_encode: needs sentences and rounds, got {len(sentences)} and {rounds}")
    sentences = list(sentences)
    rival = _sentence_transformer(Path(reference_folder))

    def ours() -> np.ndarray:
        return model.encode(sentences, batch_size=batch_size)

    def theirs() -> np.ndarray:
        return rival.encode(sentences, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)

    with _bar(progress, "bench encode", rounds + 1) as advance, _torch_threads(True):
        start = time.perf_counter()
        vectors = ours()
        first = time.perf_counter() - start
        difference = float(np.abs(vectors - theirs()).max())
        advance()
        seconds: tuple[list[float], list[float]] = ([], [])
        for number in range(rounds):
            for i in (0, 1) if number % 2 == 0 else (1, 0):
                time.sleep(_PAUSE)
                start = time.perf_counter()
                (ours, theirs)[i]()
                seconds[i].append(time.perf_counter() - start)
            advance()
    return EncodeResult(
        model=name or str(reference_folder),
        n=len(sentences),
        rounds=rounds,
        median_seconds=float(np.median(seconds[0])),
        rival_median_seconds=float(np.median(seconds[1])),
        speed=_quartiles(np.array(seconds[1]) / np.array(seconds[0])),
        first_seconds=first,
        difference=difference,
    )


def make_batch(*, batch: int, length: int, vocabulary: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random ids [B, T] and their mask [B, T]: the first row is full, the others hold T/2 … T tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(max(1, length // 2), length + 1, batch)
    lengths[0] = length
    mask = np.arange(length) < lengths[:, None]
    return np.where(mask, rng.integers(0, vocabulary, (batch, length)), 0).astype(np.int32), mask


def _single(vocabulary: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return make_batch(batch=1, length=min(length, _LATENCY_LENGTH), vocabulary=vocabulary, seed=seed)


def _check_arguments(models: Sequence[Any], against: Sequence[str], **sizes: int) -> None:
    from flaxcompress.config import closest

    if not models:
        raise ValueError("bench: no model is given; name at least one folder, hub id, or minilm")
    if len({str(name) for name in models}) < len(models):
        raise ValueError(f"bench: a model is named twice: {', '.join(map(str, models))}")
    for rival in against:
        if rival not in RIVALS:
            raise ValueError(f"bench: unknown runtime {rival!r} to compare with; {closest(rival, RIVALS)}")
    for name, value in sizes.items():
        least = 0 if name == "encode" else 1
        if value < least:
            raise ValueError(f"bench: {name} must be at least {least}, got {value}")


def _installed(against: Sequence[str]) -> tuple[list[str], list[str]]:
    """The rivals that can run, and a note on each that cannot."""
    present, notes = [], []
    for rival in dict.fromkeys(against):
        missing = [package for package in RIVALS[rival] if util.find_spec(package) is None]
        if missing:
            notes.append(f"{rival}: left out, since {' and '.join(missing)} cannot be imported; install: {_INSTALL}")
        else:
            present.append(rival)
    return present, notes


def _quartiles(values: np.ndarray) -> dict[str, float]:
    q1, median, q3 = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "q1": float(q1), "q3": float(q3)}


def _versions() -> dict[str, str]:
    from flaxcompress.evaluate.report import versions

    found = versions()
    for package in ("torch", "transformers", "sentence-transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _bar(show: bool, label: str, total: int) -> Any:
    from flaxcompress.progress import progress_bar

    return progress_bar(label, total, show=show)


@dataclasses.dataclass
class _Timed:
    """Seconds of each contestant's calls, round by round, and the joules of its forward passes."""

    forward: list[list[float]]
    single: list[list[float]]
    joules: list[float] | None


def _rounds(runners: Sequence[Any], inputs: Sequence[Any], rounds: int, advance: Any) -> _Timed:
    meter = _Energy()
    timed = _Timed([[] for _ in runners], [[] for _ in runners], [0.0] * len(runners) if meter.readable else None)
    for number in range(rounds):
        for place in range(len(runners)):
            i = (number + place) % len(runners)  # nobody always runs after the same neighbour
            run, (many, one) = runners[i], inputs[i]
            time.sleep(_PAUSE)
            before = meter.read()
            start = time.perf_counter()
            run(many)
            timed.forward[i].append(time.perf_counter() - start)
            if timed.joules is not None:
                timed.joules[i] += meter.since(before)
            for _ in range(_LATENCY_CALLS):
                start = time.perf_counter()
                run(one)
                timed.single[i].append(time.perf_counter() - start)
        advance(note="")
    return timed


class _Energy:
    """The processor packages' energy counters, which count microjoules and wrap around."""

    def __init__(self):
        self._counters: list[tuple[Path, int]] = []
        for folder in sorted(_POWER.glob("intel-rapl:*")):
            if folder.name.count(":") != 1:
                continue  # a part of a package
            try:
                int((folder / "energy_uj").read_text())
                limit = int((folder / "max_energy_range_uj").read_text())
            except (OSError, ValueError):
                self._counters = []  # half of the packages would mislead
                break
            self._counters.append((folder / "energy_uj", limit))

    @property
    def readable(self) -> bool:
        return bool(self._counters)

    def read(self) -> list[int]:
        return [int(file.read_text()) for file, _ in self._counters]

    def since(self, before: list[int]) -> float:
        used = 0
        for now, then, (_, limit) in zip(self.read(), before, self._counters, strict=True):
            used += now - then if now >= then else now - then + limit
        return used / 1e6


def _encode_all(
    folders: dict[str, Path], own: dict[str, _Flax], count: int, rounds: int, progress: bool
) -> tuple[tuple[EncodeResult, ...], list[str]]:
    if not count:
        return (), []
    if util.find_spec("sentence_transformers") is None:
        return (), [f"encode: left out, since sentence_transformers cannot be imported; install: {_INSTALL}"]
    from flaxcompress.data.calibration import calibration_text

    sentences = calibration_text().train[:count]
    notes = [f"encode: there are only {len(sentences):,} docstring sentences"] if len(sentences) < count else []
    results = [
        bench_encode(one.model, folders[name], sentences, max(1, rounds // 4), name=name, progress=progress)
        for name, one in own.items()
    ]
    return tuple(results), notes


# ── the contestants ──────────────────────────────────────────────────────────────────────────────────────────────────


class _Flax:
    """A model in flaxcompress, its forward pass under jit."""

    def __init__(self, folder: Path):
        import jax

        from flaxcompress.encoding import compute_dtype
        from flaxcompress.folder import load
        from flaxcompress.nn import Transformer

        self.model = load(folder)
        network = Transformer(self.model.config, compute_dtype())
        self.device = jax.default_backend()
        self._forward = jax.jit(
            lambda params, ids, mask: network.apply({"params": params}, ids, mask, need_logits=False)
        )

    def prepare(self, ids: np.ndarray, mask: np.ndarray) -> Any:
        import jax.numpy as jnp

        return jnp.asarray(ids), jnp.asarray(mask)

    def __call__(self, inputs: Any) -> Any:
        import jax

        return jax.block_until_ready(self._forward(self.model.params, *inputs))

    def states(self, inputs: Any) -> np.ndarray:
        return np.asarray(self(inputs).last_hidden_state, np.float32)


class _Torch:
    """A model in PyTorch, on the CPU in float32: stock with SDPA attention, or a saved folder's own code."""

    def __init__(self, folder: Path):
        import torch
        from transformers import AutoModel

        own = json.loads((folder / "config.json").read_text("utf-8")).get("model_type") == _OWN
        options: dict[str, Any] = {"trust_remote_code": True} if own else {"attn_implementation": "sdpa"}
        if own:
            _check_code(folder)
        with _quiet_transformers():
            network = AutoModel.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True, **options)
        self._network = network.eval()

    def prepare(self, ids: np.ndarray, mask: np.ndarray) -> Any:
        import torch

        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(mask.astype(np.int64))

    def __call__(self, inputs: Any) -> Any:
        import torch

        with torch.inference_mode():
            return self._network(input_ids=inputs[0], attention_mask=inputs[1])

    def states(self, inputs: Any) -> np.ndarray:
        return self(inputs).last_hidden_state.numpy()


def _check_code(folder: Path) -> None:
    """Only this version's own code is ever run from a folder."""
    name = "modeling_flaxcompress.py"
    ours = Path(__file__).parent / "export" / name
    if not (folder / name).is_file() or (folder / name).read_bytes() != ours.read_bytes():
        raise ValueError(
            f"{folder / name}: missing, or not this version's file, and no other code is run from a folder; "
            "save the model again with this version"
        )


def _sentence_transformer(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    own = json.loads((folder / "config.json").read_text("utf-8")).get("model_type") == _OWN
    if own:
        _check_code(folder)
    with _quiet_transformers():
        return SentenceTransformer(str(folder), device="cpu", trust_remote_code=own, local_files_only=True)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _torch_threads(use: bool) -> Iterator[int]:
    """PyTorch with one thread for each core that this process may use, as XLA has; yields their number."""
    count = _cores()
    if not use:
        yield count
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ── cold start and memory, in a process of its own ───────────────────────────────────────────────────────────────────


def _in_process_of_its_own(runtime: str, folder: Path, shapes: dict[str, int]) -> dict[str, Any]:
    """{import_seconds, load_seconds, first_call_seconds, peak_bytes} of one contestant."""
    request = json.dumps({"runtime": runtime, "folder": str(folder.absolute()), "shapes": shapes})
    root = str(Path(__file__).absolute().parents[1])
    paths = [path for path in (os.environ.get("PYTHONPATH"), root) if path]
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(Path(__file__).absolute()), request],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{folder}: {runtime} did not load and run within {_PROBE_SECONDS} s") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(f"{folder}: {runtime} failed in a process of its own: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _probe(request: dict[str, Any]) -> dict[str, Any]:
    folder = Path(request["folder"])
    start = time.perf_counter()
    if request["runtime"] == _OWN:
        import flaxcompress.folder  # noqa: F401

        runner_class: Any = _Flax
    else:
        import torch
        import transformers

        _ = transformers.AutoModel  # transformers imports its parts when they are asked for
        torch.set_num_threads(_cores())
        runner_class = _Torch
    imported = time.perf_counter()
    runner = runner_class(folder)
    loaded = time.perf_counter()
    runner(runner.prepare(*make_batch(**request["shapes"])))
    return {
        "import_seconds": imported - start,
        "load_seconds": loaded - imported,
        "first_call_seconds": time.perf_counter() - loaded,
        "peak_bytes": _peak_bytes(),
    }


def _peak_bytes() -> int:
    """The most resident memory this process has had."""
    with contextlib.suppress(OSError):
        # Not ru_maxrss first: on Linux it survives exec, so a child starts with its parent's peak.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(json.dumps(_probe(json.loads(sys.argv[1]))))
