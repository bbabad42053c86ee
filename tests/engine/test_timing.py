"""The fastest of the sizes that fit, by a clock that is told what it sees."""

import pytest
import torch

from wholebatch.engine.fit.timing import fastest_of


class Clocked:
    """Passes that take as long as is said, or fail."""

    def __init__(self, seconds, device="cpu"):
        self._seconds = seconds
        self.device = torch.device(device)
        self.asked = []
        self.row_seconds = float("inf")

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
    assert clocked.asked == [64]


def test_a_window_that_was_brief_when_it_was_traced_is_not_timed():
    clocked = Clocked(lambda rows: 0.01 * rows)
    clocked.row_seconds = 1e-4
    assert fastest_of(clocked, 64, 256, 3) == (64, "")
    assert clocked.asked == []


def test_smaller_sizes_are_not_run_once_they_are_slower():
    """A recurrent network takes as long for one row as for many: its small sizes would cost a window each."""
    clocked = Clocked(lambda _: 0.05)
    assert fastest_of(clocked, 64, 256, 3)[0] == 64
    assert clocked.asked == [64, 32]


def test_looking_takes_less_than_half_a_window_of_four_micro_batches():
    seconds = {64: 0.64, 32: 0.32, 16: 0.16, 4: 0.04}
    clocked = Clocked(seconds.__getitem__)
    _, said = fastest_of(clocked, 64, 256, 3)
    assert sum(map(seconds.__getitem__, clocked.asked)) < 4 * 0.64 / 2
    assert said.startswith(" (rows a second: 100 with 4, ")


class Disturbed(Clocked):
    """Passes of which the first of some sizes takes longer than it should."""

    def __init__(self, seconds, disturbed):
        super().__init__(lambda rows: seconds(rows) * (disturbed.get(rows, 1) if self.asked.count(rows) == 1 else 1))


def test_the_first_pass_of_all_is_not_held_against_the_largest_size_where_it_is_short():
    clocked = Disturbed(lambda rows: 0.0001 * rows, {64: 2})
    assert fastest_of(clocked, 64, 1024, 3)[0] == 64
    assert sorted(clocked.asked) == [4, 4, 16, 16, 32, 32, 64, 64]


@pytest.mark.parametrize("disturbed", [{16: 1.3}, {16: 1.6}, {32: 1.4}], ids=str)
def test_a_pass_that_another_process_slowed_down_does_not_decide(disturbed):
    """The best is 16 rows at once."""
    seconds = {64: 0.64 * 1.3, 32: 0.32 * 1.15, 16: 0.16, 4: 0.044}
    assert fastest_of(Disturbed(seconds.__getitem__, {}), 64, 256, 3)[0] == 16
    assert fastest_of(Disturbed(seconds.__getitem__, disturbed), 64, 256, 3)[0] == 16


def test_such_a_pass_would_decide_with_one_look_at_each_size():
    seconds = {64: 0.64 * 1.3, 32: 0.32 * 1.15, 16: 0.16 * 1.3, 4: 0.044}
    assert fastest_of(Clocked(seconds.__getitem__), 64, 256, 3)[0] == 4


def test_no_size_is_looked_at_twice_where_the_largest_is_taken():
    clocked = Clocked(lambda rows: 0.01 * rows)
    fastest_of(clocked, 64, 256, 3)
    assert clocked.asked == [64, 32, 16, 4]


def test_a_device_that_compiles_is_warmed_for_each_size():
    clocked = Clocked(lambda rows: 0.01 * rows, "cuda")
    fastest_of(clocked, 64, 256, 3)
    assert clocked.asked == [64, 64, 32, 32, 16, 16, 4, 4]


def test_sizes_that_are_refused_or_run_out_of_memory_are_left_out():
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
