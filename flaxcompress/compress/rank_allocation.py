"""How many components each of several matrices keeps, for a number of values that all of them may hold together."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from flaxcompress.formats.low_rank import break_even_rank

Shape = tuple[int, int]
Ranks = dict[str, int | None]  # None: the matrix stays dense


def values_of(shape: Shape, rank: int | None) -> int:
    """How many values an n×m matrix holds: r(n + m) in two factors, nm when it is dense."""
    n, m = shape
    return n * m if rank is None else rank * (n + m)


def water_filling(losses: Mapping[str, Float[np.ndarray, " k"]], shapes: Mapping[str, Shape], budget: int) -> Ranks:
    """Ranks of least summed loss, found greedily: the component of largest loss per value that it takes comes next.

    A matrix that reaches the rank from which its factors would be larger than itself becomes dense, which keeps all of
    its components. Where losses fall within each matrix, no other ranks of that many values lose less (the greedy
    solution of a concave knapsack), but for the last component and those steps to dense.

    Args:
      losses: {matrix: what cutting each component costs}, in the order in which components are kept.
      budget: values that all matrices may hold together.

    Raises ValueError when rank 1 everywhere takes more, naming the number.
    """
    ranks: Ranks = dict.fromkeys(losses, 1)
    room = budget - sum(values_of(shapes[a], 1) for a in ranks)
    if room < 0:
        raise ValueError(f"ranks: rank 1 of every matrix takes {budget - room} values, more than the {budget} allowed")
    heap = [step for a in ranks if (step := _next(a, 1, losses[a], shapes[a])) is not None]
    heapq.heapify(heap)
    while heap:
        _, address, size = heapq.heappop(heap)
        if size > room:  # the others may still fit
            continue
        room -= size
        rank = (ranks[address] or 0) + 1
        ranks[address] = rank if rank <= break_even_rank(*shapes[address]) else None
        if ranks[address] is not None and (step := _next(address, rank, losses[address], shapes[address])) is not None:
            heapq.heappush(heap, step)
    return ranks


def _next(address: str, rank: int, losses: np.ndarray, shape: Shape) -> tuple[float, str, int] | None:
    """(-gain per value, matrix, values) of one more component; from the last rank that is smaller, of being dense."""
    whole = rank + 1 > break_even_rank(*shape)
    size = values_of(shape, None if whole else rank + 1) - values_of(shape, rank)
    gain = losses[rank:].sum() if whole else losses[rank]
    return (-float(gain) / max(size, 1), address, size)


def zero_sum(effects: Mapping[str, Float[np.ndarray, " k"]], shapes: Mapping[str, Shape], budget: int) -> Ranks:
    """Ranks whose cuts change the loss, to first order, by about nothing in sum (ZS-SVD, 2026).

    Every matrix gives up its components from the last one on. What comes next is the cut of smallest effect among those
    that bring the sum of the effects so far back towards zero, until the matrices fit the budget.

    Args:
      effects: {matrix: first-order change of the loss when a component is cut}, for all min(n, m) components, in the
        order in which they are kept.
      budget: values that all matrices may hold together.

    Raises ValueError when rank 1 everywhere takes more, naming the number.
    """
    least = sum(values_of(shapes[a], 1) for a in effects)
    if least > budget:
        raise ValueError(f"ranks: rank 1 of every matrix takes {least} values, more than the {budget} allowed")
    ranks = {a: len(e) for a, e in effects.items()}
    raising: list[tuple[float, str]] = []
    lowering: list[tuple[float, str]] = []

    def offer(address: str) -> None:
        if ranks[address] > 1:
            effect = float(effects[address][ranks[address] - 1])
            heapq.heappush(raising if effect > 0 else lowering, (abs(effect), address))

    def stored(address: str) -> int:
        return min(values_of(shapes[address], ranks[address]), values_of(shapes[address], None))

    for address in ranks:
        offer(address)
    total, change = sum(map(stored, ranks)), 0.0
    while total > budget:
        heap = lowering if (change > 0 and lowering) or not raising else raising
        size, address = heapq.heappop(heap)
        change += size if heap is raising else -size
        total -= stored(address)
        ranks[address] -= 1
        total += stored(address)
        offer(address)
    return {a: r if r <= break_even_rank(*shapes[a]) else None for a, r in ranks.items()}
