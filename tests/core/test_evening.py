"""Which rows move between ranks that have theirs already?"""

import math

from hypothesis import given
from hypothesis import strategies as st

from wholebatch.core.balance import balanced
from wholebatch.core.evening import CLOSE, moves_between

COSTS = st.lists(st.lists(st.integers(1, 600).map(float), max_size=20), min_size=1, max_size=6)


def after(costs, moves):
    """What each rank has, its own first."""
    gone = {(move.source, move.row) for move in moves}
    held = [[cost for row, cost in enumerate(each) if (rank, row) not in gone] for rank, each in enumerate(costs)]
    for move in moves:
        held[move.to].append(costs[move.source][move.row])
    return held


@given(costs=COSTS)
def test_every_row_stays_or_moves_once(costs):
    moves = moves_between(costs)
    assert len({(move.source, move.row) for move in moves}) == len(moves)
    assert all(move.source != move.to and 0 <= move.row < len(costs[move.source]) for move in moves)
    held = after(costs, moves)
    assert sorted(cost for each in held for cost in each) == sorted(cost for each in costs for cost in each)


@given(costs=COSTS)
def test_ranks_end_close_or_no_further_apart_than_the_cheapest_row_of_the_fullest(costs):
    held = after(costs, moves_between(costs))
    loads = [math.fsum(each) for each in held]
    gap = max(loads) - min(loads)
    cheapest = min(held[loads.index(max(loads))], default=0.0)
    assert gap <= max(CLOSE * sum(loads) / len(loads), cheapest) * (1 + 1e-8)


@given(costs=COSTS)
def test_nobody_gets_more_than_the_fullest_had(costs):
    assert max(map(math.fsum, after(costs, moves_between(costs)))) <= max(map(math.fsum, costs)) * (1 + 1e-8)


def test_what_is_close_stays():
    assert moves_between([[100.0, 50.0], [149.0]]) == []
    assert moves_between([[100.0, 50.0], [149.0]], close=0.0) == []  # no row is that cheap
    assert moves_between([[], []]) == moves_between([[5.0]]) == moves_between([]) == []


def test_few_rows_move_where_a_new_division_would_move_most():
    """64 rows on each of 4 ranks, of which the first has a tenth more to do."""
    costs = [[10.0 + row % 7 + (rank == 0) for row in range(64)] for rank in range(4)]
    moves = moves_between(costs)
    held = [math.fsum(each) for each in after(costs, moves)]
    assert max(held) / min(held) < 1 + 2 * CLOSE
    ours = [rank for rank in range(4) for _ in costs[rank]]
    division = balanced([cost for each in costs for cost in each], 4)
    anew = sum(ours[row] != rank for rank, rows in enumerate(division) for row in rows)
    assert len(moves) * 8 < anew
