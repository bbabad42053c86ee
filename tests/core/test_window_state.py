"""Where are we? The state of a window, and which micro-batch closes it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import wholebatch as wb
from wholebatch.core.window import Phase, WindowState, check_stream, group


@given(items=st.lists(st.one_of(st.none(), st.integers()), max_size=40), places=st.integers(1, 12))
def test_a_stream_is_grouped_without_loss_and_every_window_closes(items, places):
    pairs = list(group(iter(items), places))
    tail = [(None, True)] if len(items) % places else []
    assert [item for item, _ in pairs] == items + [item for item, _ in tail]
    closing = [place for place, (_, closes) in enumerate(pairs, 1) if closes]
    assert len(closing) == -(-len(items) // places)
    assert all(place % places == 0 for place in closing[: len(items) // places])
    assert not pairs or pairs[-1][1]


def test_a_stream_is_never_read_ahead():
    read = []
    walk = group((read.append(item) or item for item in range(9)), 2)
    for expected in range(1, 6):
        next(walk)
        assert len(read) == expected


def test_a_window_of_no_micro_batches_is_refused():
    with pytest.raises(wb.WindowError, match="window of 0 micro-batches") as error:
        list(group("ab", 0))
    assert "micro_batches=1" in error.value.hint


def test_rows_are_unknown_once_a_micro_batch_did_not_say():
    state = WindowState()
    state.add(rows=2, targets=5)
    state.leave_out(rows=3)
    assert (state.rows, state.targets, state.micro_batches) == (5, 5, 1)
    state.add(rows=None, targets=1)
    state.add(rows=4, targets=1)
    assert (state.rows, state.targets, state.micro_batches) == (None, 7, 3)


@pytest.mark.parametrize("phase", [Phase.CLOSED, Phase.ROLLED_BACK], ids=str)
def test_a_window_ends_once(phase):
    state = WindowState()
    state.require_open("take a loss")
    state.end(phase)
    with pytest.raises(wb.WindowError, match=f"cannot take a loss after it was {phase.value}") as error:
        state.require_open("take a loss")
    assert "accumulator.window()" in error.value.hint


def test_a_single_batch_is_no_loader():
    with pytest.raises(wb.WindowError, match="is no loader of micro-batches") as error:
        check_stream({"x": 1}, 2)
    assert "accumulator.step(batch)" in error.value.hint
