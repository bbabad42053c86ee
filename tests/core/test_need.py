"""What a micro-batch takes at any size, from runs at a few."""

import pytest

from wholebatch.core.need import Need, Passes, lagrange
from wholebatch.core.trace import Trace, few_looks

KINDS = ("data", "activations", "temporary", "temporary", "gradients", "activations", "data")


def run(rows, length=1, *, gradient=1000):
    """A window with a gradient, activations that are a square in the length, and a product that comes and goes."""
    data, kept, passing = 8 * rows * length, rows * (3 * length + 2 * length**2), 50 * rows
    first = (data, kept, passing, -passing, gradient, -kept, -data)
    second = (data, kept, passing, gradient, -passing, -gradient, -kept, -data)
    again = ("data", "activations", "temporary", "temporary", "temporary", "temporary", "activations", "data")
    return Trace(first + second, KINDS + again, len(first))


def peak(rows, length=1, *, alone=False):
    """The same, worked out by hand."""
    data, kept, passing = 8 * rows * length, rows * (3 * length + 2 * length**2), 50 * rows
    if alone:
        return data + kept + max(passing, 1000)
    return data + kept + passing + 2000


@pytest.mark.parametrize("rows", [1, 2, 7, 1000])
@pytest.mark.parametrize("alone", [True, False])
def test_two_small_runs_say_every_peak(rows, alone):
    passes = Passes.of({(2, 0): run(2), (4, 0): run(4)})
    assert passes.exact
    assert passes.peak(rows, alone=alone) == peak(rows, alone=alone)


@pytest.mark.parametrize("length", [1, 3, 16, 40])
def test_three_lengths_say_every_length(length):
    passes = Passes.of({(rows, each): run(rows, each) for rows in (2, 4) for each in (2, 9, 16)})
    assert passes.peak(5, length) == peak(5, length)


def test_the_bound_sees_a_line_through_the_peaks():
    """The peak is no line in the rows: which moment is highest changes. A line through two peaks is off."""
    small, large = peak(2, alone=True), peak(4, alone=True)
    line = small + (large - small) / 2 * (1000 - 2)
    assert abs(line / peak(1000, alone=True) - 1) > 0.2


def test_two_lengths_are_too_few_for_a_square():
    passes = Passes.of({(rows, each): run(rows, each) for rows in (2, 4) for each in (2, 16)})
    assert passes.peak(5, 9) != peak(5, 9)


def test_runs_that_differ_are_compared_by_their_peaks():
    odd = run(4)
    odd = Trace((*odd.changes[:2], 7, -7, *odd.changes[2:]), (*KINDS[:2], "temporary", "temporary", *odd.kinds[2:]), 9)
    passes = Passes.of({(2, 0): run(2), (4, 0): odd})
    assert not passes.exact
    assert passes.peak(2) == peak(2)
    assert passes.peak(4) == peak(4)


def test_kinds_add_up_to_the_peak():
    passes = Passes.of({(2, 0): run(2), (4, 0): run(4)})
    need = Need({"weights": 500, "optimizer state": 900}, passes, step_bytes=1600)
    for rows in (1, 8, 100):
        kinds = need.by_kind(rows)
        assert sum(kinds.values()) == need.peak(rows)
        assert kinds["weights"] == 500
        assert kinds["gradients"] == 1000
    assert need.gradient_bytes == 1000
    assert need.floor_bytes == 500 + 900 + 1600
    assert need.per_row() == 5


def test_a_step_may_be_the_highest_moment():
    passes = Passes.of({(2, 0): run(2), (4, 0): run(4)})
    need = Need({"weights": 500}, passes, step_bytes=50_000)
    assert need.peak(1) == 50_500
    assert need.by_kind(1) == {"weights": 500, "gradients": 1000, "temporary": 49_000}


def scratched(rows, more):
    trace = run(rows)
    at = trace.second + 3
    return Trace(
        (*trace.changes[:at], more, -more, *trace.changes[at:]), ("scratch",) * (len(trace.changes) + 2), trace.second
    )


@pytest.mark.parametrize("length", [0, 1])
def test_what_kernels_take_for_themselves_is_added(length):
    passes = Passes.of({(2, length): run(2), (4, length): run(4)})
    measured = Passes.of({(2, 0): scratched(2, 4000), (4, 0): scratched(4, 8000)})
    need = Need({}, passes, 0, measured, length)
    # The scratch stands before the second gradient.
    assert need.peak(100, length) == peak(100) - 1000 + 200_000
    assert need.by_kind(100, length)["scratch"] == need.scratch(100, length) == 199_000
    assert sum(need.by_kind(100, length).values()) == need.peak(100, length)


def test_kernels_may_take_less_than_their_operations_say():
    passes = Passes.of({(2, 0): run(2), (4, 0): run(4)})
    measured = Passes.of({(2, 0): run(2, gradient=990), (4, 0): run(4, gradient=990)})
    need = Need({}, passes, 0, measured)
    assert need.scratch(10) == -20
    assert sum(need.by_kind(10).values()) == need.peak(10) == peak(10) - 20


def test_a_trace_doubled_is_no_less_than_twice_the_rows():
    twice = Passes.of({(1, 0): run(1), (2, 0): run(1).doubled()})
    assert twice.peak(50) >= peak(50)


def test_what_is_as_large_as_a_weight_is_not_doubled_unless_it_is_a_multiple_of_the_rows():
    kinds = ("gradients", "activations", "temporary", "temporary", "temporary")
    trace = Trace((7, 50, 14, 20, 3), kinds, 5)
    assert trace.doubled(5, {14, 20}).changes == (7, 100, 14, 40, 6)
    assert trace.doubled().changes == (7, 100, 28, 40, 6)
    assert trace.doubtful(5, {14, 20}) == (20 + 3) / (50 + 20 + 3)
    assert trace.doubtful(5, ()) == (14 + 3) / (50 + 14 + 20 + 3)


def test_weights_of_places():
    assert lagrange([5], 9) == [1.0]
    assert sum(weight * place**2 for weight, place in zip(lagrange([1, 2, 5], 7), (1, 2, 5), strict=True)) == 49


@pytest.mark.parametrize(
    ("fixed", "looks"),
    [
        pytest.param(lambda _: 0, 4, id="all grows with the rows, or stays"),
        pytest.param(lambda length: length**2, 6, id="a size has a part of each"),
    ],
)
def test_what_follows_from_longer_rows_is_not_looked_at(fixed, looks):
    """Gradients stay, activations grow; where one size does both, nothing follows for shorter rows."""
    asked = []

    def look(size):
        asked.append(size)
        rows, length = size
        kept = rows * length + fixed(length)
        return Trace((500, kept, -kept), ("gradients", "activations", "activations"), 3)

    sizes = [(rows, length) for length in (2, 7, 9) for rows in (2, 4)]
    traces = few_looks(look, sizes)
    assert asked[0] == (4, 9), "what may be too much is asked for first"
    assert len(asked) == len(set(asked)) == looks
    assert traces == {size: look(size) for size in sizes}


def test_runs_that_differ_say_nothing_about_each_other():
    low, high, odd = run(2, 9), run(4, 9), Trace((1, 2), ("activations", "gradients"), 2)
    assert run(2, 3).grown(2, low, high) == run(4, 3)
    assert odd.grown(2, low, high) is run(2, 3).grown(2, odd, odd) is run(2, 3).grown(2, low, odd) is None
