"""Interleaved comparisons with other runtimes: throughput, latency, cold start, memory, energy.

Every contestant gets the same ids and mask, and every round times each of them once, so that what else the machine does
falls on all alike; what is reported is the median of the ratios within a round. Cold start and peak memory are taken in
a process of each contestant's own.
"""

from flaxcompress.bench.batch import make_batch
from flaxcompress.bench.compare import bench
from flaxcompress.bench.encode import bench_encode
from flaxcompress.bench.result import BenchResult, Contestant, EncodeResult
from flaxcompress.bench.runtimes import RIVALS

__all__ = ["RIVALS", "BenchResult", "Contestant", "EncodeResult", "bench", "bench_encode", "make_batch"]
