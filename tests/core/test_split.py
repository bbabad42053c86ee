"""Which rows go together?"""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import wholebatch as wb
from wholebatch.core.split import Rows, Tokens, cut_by_length, padding

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=60)


@given(num_rows=st.integers(0, 200), rows=st.integers(1, 50))
def test_rows_are_cut_once_each_in_order_and_only_the_last_part_is_smaller(num_rows, rows):
    cut = Rows(rows).cut(num_rows)
    assert [row for part in cut for row in part] == list(range(num_rows))
    assert all(len(part) == rows for part in cut[:-1])
    assert all(1 <= len(part) <= rows for part in cut)


@given(lengths=LENGTHS, budget=st.integers(1, 100))
def test_a_token_budget_is_kept_unless_a_row_alone_is_longer(lengths, budget):
    for part in Tokens(budget, length=len).cut(lengths):
        assert len(part) == 1 or len(part) * max(lengths[row] for row in part) <= budget


@given(lengths=LENGTHS, budget=st.integers(1, 100))
def test_a_token_budget_takes_every_row_once_the_longest_first(lengths, budget):
    cut = Tokens(budget, length=len).cut(lengths)
    assert sorted(row for part in cut for row in part) == list(range(len(lengths)))
    walked = [lengths[row] for part in cut for row in part]
    assert walked == sorted(lengths, reverse=True)


def _cost(parts, budget):
    """What the docstring says a cut costs: its padded tokens, and for each micro-batch a thirtieth of the budget."""
    return sum(len(part) * part[0] for part in parts) + len(parts) * min(200, max(75, budget / 30))


def _all_cuts(lengths):
    walked = sorted(lengths, reverse=True)
    for number in range(len(walked)):
        for places in combinations(range(1, len(walked)), number):
            yield [walked[start:end] for start, end in pairwise([0, *places, len(walked)])]


def _as_full_as_can_be(lengths, budget):
    parts = []
    for length in sorted(lengths, reverse=True):
        if not parts or (len(parts[-1]) + 1) * parts[-1][0] > budget:
            parts.append([])
        parts[-1].append(length)
    return parts


@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=8), budget=st.integers(1, 30_000))
def test_no_cut_of_the_sorted_rows_costs_less(lengths, budget):
    ours = [[lengths[row] for row in part] for part in Tokens(budget, length=len).cut(lengths)]
    allowed = [
        parts for parts in _all_cuts(lengths) if all(len(part) == 1 or len(part) * part[0] <= budget for part in parts)
    ]
    assert _cost(ours, budget) == pytest.approx(min(_cost(parts, budget) for parts in allowed))


def test_a_micro_batch_closes_before_it_is_full_where_the_next_rows_are_much_shorter():
    """The bound above sees a cut that fills each micro-batch: it pads three short rows to the length of a long one."""
    lengths = [400, 400, 40, 40, 40, 40]
    assert Tokens(2000, length=len).cut(lengths) == [[0, 1], [2, 3, 4, 5]]
    full = _as_full_as_can_be(lengths, 2000)
    assert full == [[400, 400, 40, 40, 40], [40]]
    assert _cost(full, 2000) > 1.7 * _cost([[400, 400], [40, 40, 40, 40]], 2000)


@pytest.mark.parametrize(("budget", "parts"), [(2_000, 2), (3_500, 2), (3_700, 1), (200_000, 1)])
def test_a_pass_costs_a_thirtieth_of_the_budget_within_bounds(budget, parts):
    """Two micro-batches instead of one save 120 padded tokens."""
    assert len(Tokens(budget, length=len).cut([100, 100, 60, 60, 60])) == parts


def test_a_pass_costs_no_more_than_two_hundred_tokens_whatever_the_budget():
    lengths = [200, 200, 100, 100, 90]
    assert len(Tokens(1 << 40, length=len).cut(lengths)) == 2


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=200),
    fit=st.integers(1, 4000),
    cheap=st.integers(1, 30_000),
    dear=st.integers(1, 30_000),
)
def test_where_a_pass_costs_less_no_more_is_padded_and_each_further_pass_saves_what_it_costs(lengths, fit, cheap, dear):
    cheap, dear = sorted((cheap, dear))
    cuts = [cut_by_length(lengths, lambda length: fit // length, budget) for budget in (cheap, dear)]
    (many, few), (passes, fewer) = ([sum(len(p) * lengths[p[0]] for p in cut) for cut in cuts], map(len, cuts))
    assert many <= few
    assert passes >= fewer
    assert few - many >= (passes - fewer) * min(200, max(75, cheap / 30)) - 1e-6


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=400), budget=st.integers(1, 4000))
def test_a_cut_costs_no_more_than_micro_batches_as_full_as_can_be(lengths, budget):
    cut = Tokens(budget, length=len).cut(lengths)
    ours = [[lengths[row] for row in part] for part in cut]
    assert _cost(ours, budget) <= _cost(_as_full_as_can_be(lengths, budget), budget) + 1e-9


@given(lengths=LENGTHS, budget=st.integers(1, 100))
def test_padding_is_the_share_of_positions_without_a_token(lengths, budget):
    cut = Tokens(budget, length=len).cut(lengths)
    tokens = [[1] * lengths[row] for part in cut for row in part]
    padded = [token for part in cut for row in part for token in _pad(lengths[row], max(lengths[r] for r in part))]
    share = padded.count(0) / len(padded) if padded else 0.0
    assert padding(lengths, cut) == pytest.approx(share, abs=1e-15)
    assert padded.count(1) == sum(map(len, tokens))


def _pad(length: int, to: int) -> list[int]:
    return [1] * length + [0] * (to - length)


def test_sorted_lengths_pad_less_than_rows_in_the_order_in_which_they_come():
    lengths = [40, 1, 38, 2, 1, 39]
    assert padding(lengths, Tokens(120, length=len).cut(lengths)) < padding(lengths, Rows(3).cut(6)) / 2


def test_a_micro_batch_holds_something():
    with pytest.raises(wb.SplitError, match="0 rows"):
        Rows(0)
    with pytest.raises(wb.SplitError, match="-1 tokens"):
        Tokens(-1, length=len)


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        (lambda: Rows(2.5), r"wb.Rows\(2.5\) is no whole number"),
        (lambda: Rows("8"), r"wb.Rows\('8'\) is no whole number"),
        (lambda: Rows(True), r"wb.Rows\(True\) is no whole number"),
        (lambda: Tokens("4k", len), r"wb.Tokens\('4k'\) is no whole number"),
        (lambda: Tokens(64, "length"), "length is a str, which cannot be called"),
    ],
    ids=["half a row", "a text", "a truth", "tokens as a text", "no function"],
)
def test_a_way_to_cut_that_cannot_be_is_refused(rule, found):
    with pytest.raises(wb.SplitError, match=found) as error:
        rule()
    assert error.value.hint


def test_ways_to_cut_say_what_they_are():
    assert (str(Rows(8)), str(Tokens(4096, length=len))) == ("8 rows", "4096 tokens")
