"""The fastest of the sizes that fit, by a clock that is told what it sees."""

import pytest
import torch

from wholebatch.engine.fit.timing import fastest_of


class Clocked:
    """Passes that take as long as is said, or fail."""

    def __init__(self, seconds):
        self._seconds = seconds
        self.asked = []

    def seconds(self, rows, row):
        assert row == 3
        self.asked.append(rows)
        return self._seconds(rows)


@pytest.mark.parametrize(
    ("seconds", "most", "chosen"),
    [
        (lambda rows: 0.1 + 0.01 * rows, 64, 64),  # the more the faster
        (lambda rows: 0.01 * rows, 64, 64),  # all alike
        (lambda rows: 0.01 * rows * (1.2 if rows > 20 else 1.0), 64, 16),  # out of the cache
        (lambda rows: 0.01 * rows * (1.02 if rows > 20 else 1.0), 64, 64),  # the clock is not finer
        (lambda rows: 0.01 * rows * (1.2 if rows > 40 else 1.0), 64, 32),
        (lambda _: 0.05, 1, 1),
    ],
)
def test_the_fastest_is_taken_and_the_largest_of_those_alike(seconds, most, chosen):
    assert fastest_of(Clocked(seconds), most, 256, 3)[0] == chosen


def test_a_brief_window_is_not_worth_the_clock():
    clocked = Clocked(lambda rows: 1e-5 * rows)
    assert fastest_of(clocked, 64, 256, 3) == (64, "")
    assert set(clocked.asked) == {4}


def test_short_passes_are_run_twice_and_long_ones_once():
    clocked = Clocked(lambda rows: 1e-3 * rows)
    _, said = fastest_of(clocked, 64, 256, 3)
    assert [clocked.asked.count(rows) for rows in (4, 16, 32, 64)] == [3, 2, 1, 1]
    assert said.startswith(" (rows a second: 1,000 with 4, ")


def test_sizes_that_are_refused_are_left_out_and_a_shortage_ends_it():
    def seconds(rows):
        if rows == 4:
            raise ValueError("batch norm takes no single row")
        if rows > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 0.1 * rows

    assert fastest_of(Clocked(seconds), 64, 256, 3)[0] == 16

    def never(_):
        raise ValueError("no size")

    assert fastest_of(Clocked(never), 64, 256, 3) == (64, "")
