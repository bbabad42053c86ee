"""Which rank takes which rows of a logical batch, so that all finish together?

A logical batch over several ranks is over when the slowest rank is done. Its update does not depend on who takes which
row, so rows may go where there is time for them.
"""

import heapq
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from wholebatch.core.errors import SplitError

ATTENTION = 2e-4
"""What a token pays for each token of its row, against what it pays alone: 1 / (6 * 768)."""


_ROUNDING = 1e-12
"""Ranks that are closer than this share of their work are equally full."""


def costs_of(lengths: Sequence[int], attention: float = ATTENTION) -> list[float]:
    """Return what rows cost to train on: s + attention * s^2 for s tokens, and one token at the least.

    Args:
        lengths: Tokens of each row; shape ``[rows]``.
        attention: What a token pays for each token of its row, against what it pays alone. In a transformer of width d
            a token passes through 12 d^2 weights a layer and meets s others in 2 d products, which gives 1 / (6 d). 0
            for models without attention.

    Returns:
        One cost a row. Unit: tokens that are alone in their rows.

    Raises:
        SplitError: A length or `attention` is negative or not a number.

    Example:
        >>> costs_of([1000, 0], attention=0.001)
        [2000.0, 1.0]
    """
    _check("attention", attention)
    for length in lengths:
        _check("a length", length)
    return [max(1.0, length + attention * length * length) for length in lengths]


def balanced(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Return which rows each rank takes, so that the costliest rank has as little to do as possible.

    The largest differencing method (Karmarkar and Karp, for any number of ranks): a row alone is a division of itself,
    with nothing for the other ranks. The two divisions whose ranks are furthest apart are joined, the fullest rank of
    one with the emptiest of the other, until one is left. Joining never makes the distance larger than the larger of
    the two, so the ranks end no further apart than the costliest row. Where handing the rows out one by one, the
    costliest first, or in turn, happens to do better, that is returned.

    Args:
        costs: What each row costs; shape ``[rows]``.
        ranks: How many share them.

    Returns:
        Rows of each rank, in ascending order; every row exactly once. No rank is left without a row unless there are
        fewer rows than ranks. The same input gives the same answer, on every rank.

    Raises:
        SplitError: There is no rank, or a cost is negative or not a number.

    Example:
        >>> balanced([8, 7, 6, 5, 4], ranks=2)
        [[0, 2], [1, 3, 4]]
    """
    if ranks < 1:
        raise SplitError(
            f"{ranks} ranks can share nothing.", hint="pass the number of processes that train, 1 or more."
        )
    for cost in costs:
        _check("a cost", cost)
    ways = [_differenced(costs, ranks), _one_by_one(costs, ranks), _in_turn(len(costs), ranks)]
    best = min(ways, key=lambda way: max(_loads(costs, way)))
    _even_out(costs, best)
    _fill_empty(costs, best)
    return sorted((sorted(rows) for rows in best), key=lambda rows: rows[:1] or [len(costs)])


def _differenced(costs: Sequence[float], ranks: int) -> list[list[int]]:
    # A division: what its ranks have, the most first, and the rows of each. The heap yields the widest one.
    divisions = []
    for row, cost in enumerate(costs):
        loads = [cost] + [0.0] * (ranks - 1)
        rows = [[row]] + [[] for _ in range(ranks - 1)]
        divisions.append((-cost if ranks > 1 else 0.0, row, loads, rows))
    heapq.heapify(divisions)
    while len(divisions) > 1:
        _, number, loads, rows = heapq.heappop(divisions)
        _, _, other_loads, other_rows = heapq.heappop(divisions)
        joined = [
            (load + other, _union(mine, theirs))
            for load, other, mine, theirs in zip(loads, reversed(other_loads), rows, reversed(other_rows), strict=True)
        ]
        joined.sort(key=lambda rank: -rank[0])
        loads = [load for load, _ in joined]
        rows = [taken for _, taken in joined]
        heapq.heappush(divisions, (loads[-1] - loads[0], number, loads, rows))
    return divisions[0][3] if divisions else [[] for _ in range(ranks)]


def _union(rows: list[int], others: list[int]) -> list[int]:
    if len(rows) < len(others):  # each row is copied a logarithmic number of times
        rows, others = others, rows
    rows.extend(others)
    return rows


def _one_by_one(costs: Sequence[float], ranks: int) -> list[list[int]]:
    given: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for row in sorted(range(len(costs)), key=lambda row: -costs[row]):
        load, rank = heapq.heappop(loads)
        given[rank].append(row)
        heapq.heappush(loads, (load + costs[row], rank))
    return given


def _in_turn(num_rows: int, ranks: int) -> list[list[int]]:
    return [list(range(rank, num_rows, ranks)) for rank in range(ranks)]


def _even_out(costs: Sequence[float], given: list[list[int]]) -> None:
    """Move the cheapest row of the fullest rank to the emptiest one, as long as that brings the two closer."""
    loads = _loads(costs, given)
    while True:
        fullest, emptiest = loads.index(max(loads)), loads.index(min(loads))
        cheapest = min(given[fullest], key=lambda row: costs[row], default=None)
        if cheapest is None or not loads[fullest] - loads[emptiest] > costs[cheapest] + _ROUNDING * loads[fullest]:
            return
        given[fullest].remove(cheapest)
        given[emptiest].append(cheapest)
        loads = _loads(costs, given)


def _fill_empty(costs: Sequence[float], given: list[list[int]]) -> None:
    """Give each rank without a row the cheapest one of the fullest rank that has two or more: it costs no one time."""
    for rows in given:
        spare = [other for other in given if len(other) > 1]
        if not rows and spare:
            fullest = max(spare, key=lambda other: math.fsum(costs[row] for row in other))
            cheapest = min(fullest, key=lambda row: costs[row])
            fullest.remove(cheapest)
            rows.append(cheapest)


def _loads(costs: Sequence[float], given: Sequence[Sequence[int]]) -> list[float]:
    return [math.fsum(costs[row] for row in rows) for rows in given]


def _check(what: str, value: Any) -> None:
    if not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise SplitError(
            f"{what.capitalize()} is {value!r}.", hint="lengths and costs are numbers: 0 or more, and finite."
        )
