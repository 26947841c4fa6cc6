"""One choice for each matrix, together of least loss within a budget."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Losses = Mapping[str, Mapping[Key, float]]
Costs = Mapping[str, Mapping[Key, int]]


def choose(losses: Losses[Key], costs: Costs[Key], budget: int, *, what: str = "choices") -> dict[str, Key]:
    """The choice for each name of least summed loss within `budget`, by a price per unit of cost found by bisection.

    The Lagrangian's choices are optimal for the budgets that they use up (Everett 1963); what they leave is spent
    greedily.

    Raises ValueError when even the cheapest choices cost more, saying how much.
    """
    cheapest = cheapest_of(costs)
    if total_of(costs, cheapest) > budget:
        raise ValueError(f"{what}: the smallest take {total_of(costs, cheapest)} bytes, more than the {budget} allowed")
    fitting = cheapest
    low, high = -60.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        chosen = at_price(losses, costs, 2.0**middle)
        if total_of(costs, chosen) > budget:
            low = middle
        else:
            high, fitting = middle, chosen
    return _spend_rest(losses, costs, fitting, budget)


def at_price(losses: Losses[Key], costs: Costs[Key], price: float) -> dict[str, Key]:
    """For each name the choice of least loss + price · cost."""
    return {a: min(costs[a], key=lambda k, a=a: losses[a][k] + price * costs[a][k]) for a in losses}


def within_loss(losses: Losses[Key], costs: Costs[Key], limit: float) -> dict[str, Key]:
    """The choice for each name of least cost whose summed loss is at most `limit`.

    Raises ValueError when even the choices of least loss lose more, saying how much.
    """
    best = {a: min(losses[a], key=lambda k, a=a: (losses[a][k], costs[a][k])) for a in losses}
    least = total_of(losses, best)
    if least > limit:
        raise ValueError(f"choices: the best lose {least:.3g}, more than the {limit:.3g} allowed")
    low, high = -60.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        chosen = at_price(losses, costs, 2.0**middle)
        if total_of(losses, chosen) > limit:
            high = middle
        else:
            low, best = middle, chosen
    return best


def cheapest_of(costs: Costs[Key]) -> dict[str, Key]:
    """The choice of least cost for each name."""
    return {a: min(costs[a], key=lambda k, a=a: costs[a][k]) for a in costs}


def total_of(values: Mapping[str, Mapping[Key, float]], chosen: Mapping[str, Key]) -> float:
    """The sum of the chosen values."""
    return sum(values[a][k] for a, k in chosen.items())


def _spend_rest(losses: Losses[Key], costs: Costs[Key], fitting: dict[str, Key], budget: int) -> dict[str, Key]:
    """A Lagrangian choice skips costs between its corners; what is left is spent where it helps most."""
    fitting = dict(fitting)
    while True:
        room = budget - total_of(costs, fitting)
        better = [
            ((losses[a][fitting[a]] - losses[a][k]) / (costs[a][k] - costs[a][fitting[a]]), number, a, k)
            for a in losses
            for number, k in enumerate(costs[a])
            if 0 < costs[a][k] - costs[a][fitting[a]] <= room and losses[a][k] < losses[a][fitting[a]]
        ]
        if not better:
            return fitting
        *_, address, key = max(better, key=lambda entry: entry[:2])
        fitting[address] = key
