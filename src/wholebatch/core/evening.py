"""Which rows move between ranks that have theirs already, so that all finish together? As few as do."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

CLOSE = 0.01
"""Ranks that are closer than this share of a mean rank's work are left as they are."""


class Move(NamedTuple):
    """One row that goes from one rank to another.

    Attributes:
        row: Which of those that `source` had at the start.
        source: The rank that has it.
        to: The rank that gets it.
    """

    row: int
    source: int
    to: int


def moves_between(costs: Sequence[Sequence[float]], close: float = CLOSE) -> list[Move]:
    """Return the rows that move, so that the costliest rank has little more to do than the others.

    The fullest rank gives the emptiest a row, or changes one for a cheaper one, such that they come as close as one
    such step brings them; until they are close, or no step brings them closer. So in the end they are further apart
    than `close` only where they differ by no more than the cheapest row of the fullest.

    Args:
        costs: What each row costs, by rank.
        close: How far apart ranks may be. Unit: share of the mean of all ranks.

    Returns:
        Each row at most once, from the rank that has it at first. The same input gives the same answer, on every rank.

    Example:
        >>> moves_between([[4, 3, 2, 1], [2]])
        [Move(row=0, source=0, to=1)]
    """
    # What each rank has: (cost, source, row), the cheapest first.
    held = [sorted((cost, rank, row) for row, cost in enumerate(each)) for rank, each in enumerate(costs)]
    loads = [sum(each) for each in costs]
    mean = sum(loads) / max(1, len(loads))
    for _ in range(2 * sum(map(len, costs))):
        fullest, emptiest = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[fullest] - loads[emptiest]
        if gap <= close * mean:
            break
        step = _best_step(held[fullest], held[emptiest], gap)
        if step is None:
            break
        given, taken = step
        for row, source, to in ((given, fullest, emptiest), (taken, emptiest, fullest)):
            if row is not None:
                held[source].remove(row)
                held[to].insert(bisect_left(held[to], row), row)
                loads[source] -= row[0]
                loads[to] += row[0]
    return [
        Move(row, source, rank)
        for rank, rows in enumerate(held)
        for _, source, row in sorted(rows, key=lambda each: each[1:])
        if source != rank
    ]


_Row = tuple[float, int, int]


def _best_step(full: Sequence[_Row], empty: Sequence[_Row], gap: float) -> tuple[_Row, _Row | None] | None:
    """Return what the fuller rank gives, and what it gets for it, or None where no step brings the two closer.

    A step that moves work w leaves them ``abs(gap - 2 w)`` apart.
    """
    best: tuple[_Row, _Row | None] | None = None
    apart = gap * (1 - 1e-9)  # else rounding might go round in circles
    for given in full:
        around = bisect_left(empty, (given[0] - gap / 2, -1, -1))
        for taken in (None, *empty[max(0, around - 1) : around + 1]):
            left = abs(gap - 2 * (given[0] - (taken[0] if taken is not None else 0.0)))
            if left < apart:
                best, apart = (given, taken), left
    return best
