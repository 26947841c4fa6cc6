"""What a comparison found, and its table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from flaxcompress.bench.runtimes import OWN


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
            elif one.runtime == OWN:
                yield f"{found.sentences_per_second:,.0f}\n{_spread(found.speed)} of the rival's"
            else:
                yield f"{found.rival_sentences_per_second:,.0f}"


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.3f} [{values['q1']:.3f}, {values['q3']:.3f}]"


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
