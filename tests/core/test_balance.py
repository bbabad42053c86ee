"""Which rank takes which rows?"""

import heapq
import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

import wholebatch as wb
from wholebatch.core.balance import balanced, costs_of

LENGTHS = st.lists(st.integers(0, 600), max_size=40)
RANKS = st.integers(1, 9)


def loads(costs, given):
    return [math.fsum(costs[row] for row in rows) for rows in given]


def longest_first(costs, ranks):
    """The greedy way, written down once more: the costliest row goes to whoever has the least."""
    least = [0.0] * ranks
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(least, least[0] + cost)
    return max(least)


def in_turn(costs, ranks):
    return max(math.fsum(costs[rank::ranks]) for rank in range(ranks))


@given(lengths=LENGTHS, ranks=RANKS)
def test_every_row_goes_to_one_rank(lengths, ranks):
    given = balanced(costs_of(lengths), ranks)
    assert len(given) == ranks
    assert sorted(row for rows in given for row in rows) == list(range(len(lengths)))
    assert all(rows == sorted(rows) for rows in given)


@given(lengths=LENGTHS, ranks=RANKS, attention=st.sampled_from([0.0, 2e-4, 0.05]))
def test_ranks_are_no_further_apart_than_the_costliest_row(lengths, ranks, attention):
    costs = costs_of(lengths, attention)
    work = loads(costs, balanced(costs, ranks))
    assert max(work) - min(work) <= max(costs, default=0.0) * (1 + 1e-9)


@given(lengths=LENGTHS, ranks=RANKS)
def test_it_is_never_worse_than_longest_first_or_in_turn(lengths, ranks):
    costs = costs_of(lengths)
    work = max(loads(costs, balanced(costs, ranks)))
    assert work <= min(longest_first(costs, ranks), in_turn(costs, ranks)) * (1 + 1e-9)


@given(lengths=LENGTHS, ranks=RANKS)
def test_a_rank_is_without_rows_only_if_there_are_fewer_rows_than_ranks(lengths, ranks):
    given = balanced(costs_of(lengths), ranks)
    assert sum(map(bool, given)) == min(ranks, len(lengths))


@given(costs=st.lists(st.sampled_from([0.0, 1.0, 7.5]), max_size=20), ranks=RANKS)
def test_so_it_is_where_rows_cost_nothing(costs, ranks):
    """Such rows never make a rank look full."""
    given = balanced(costs, ranks)
    assert sorted(row for rows in given for row in rows) == list(range(len(costs)))
    assert sum(map(bool, given)) == min(ranks, len(costs))


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=7), ranks=st.integers(2, 3))
def test_it_is_close_to_the_best_of_all_divisions(lengths, ranks):
    """Largest differencing is no further off than 4/3 - 1/(3 ranks), the bound of longest first."""
    costs = costs_of(lengths)
    best = min(
        max(math.fsum(c for c, to in zip(costs, division, strict=True) if to == rank) for rank in range(ranks))
        for division in product(range(ranks), repeat=len(costs))
    )
    assert max(loads(costs, balanced(costs, ranks))) <= best * (4 / 3 - 1 / (3 * ranks)) + 1e-9


def test_differencing_beats_longest_first_where_that_goes_wrong():
    """The example of Karmarkar and Karp: 8, 7, 6, 5, 4 in two parts. Longest first ends with 17 and 13."""
    costs = [8.0, 7.0, 6.0, 5.0, 4.0]
    assert longest_first(costs, 2) == 17
    assert max(loads(costs, balanced(costs, 2))) == 16


def test_the_bounds_see_rows_that_are_handed_out_in_turn():
    """What a distributed sampler does with a long row here and there breaks the bounds above, and by far."""
    costs = costs_of([512, 8] * 16)
    assert in_turn(costs, 2) > 1.9 * max(loads(costs, balanced(costs, 2)))
    assert in_turn(costs, 2) - math.fsum(costs[1::2]) > max(costs)


def test_on_many_rows_the_ranks_end_together():
    costs = costs_of([(37 * row * row) % 2003 for row in range(512)])
    work = loads(costs, balanced(costs, 8))
    assert max(work) / (sum(work) / 8) < 1.0001


def test_a_long_row_costs_more_than_two_of_half_its_length():
    whole, half = costs_of([1024, 512])
    assert whole > 2 * half
    assert costs_of([1024, 512], attention=0) == [1024, 512]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: balanced([1.0], 0), "0 ranks"),
        (lambda: balanced([1.0, float("nan")], 2), "A cost is nan"),
        (lambda: costs_of([3, -1]), "A length is -1"),
        (lambda: costs_of([3], attention=math.inf), "Attention is inf"),
        (lambda: costs_of(["long"]), "A length is 'long'"),
    ],
)
def test_nonsense_is_refused_with_a_hint(call, said):
    with pytest.raises(wb.SplitError, match=said) as caught:
        call()
    assert "hint:" in str(caught.value)
