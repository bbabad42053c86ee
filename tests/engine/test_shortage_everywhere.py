"""T5 on three models with dropout and batch norm: in every micro-batch, and in every phase of it."""

import pytest

import wholebatch as wb
from shortages import MODELS, ROWS, Fault, batch, phases_of, prepared
from wholebatch.engine import memory


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(memory, "free_cached", lambda _device: None)  # the collection of garbage takes its time


def stepped(make, fault, rows):
    accumulator, left = prepared(make, fault, rows=rows)
    made = [accumulator.step(batch()) for _ in range(3)]
    return left(), made


@pytest.mark.parametrize("name", MODELS)
def test_a_shortage_anywhere_leaves_the_run_that_had_the_finer_cut_from_the_start(name):
    """In every micro-batch of the first and the second update, and in every phase: bit for bit."""
    make = MODELS[name]
    reached = Fault()
    stepped(make, reached, 4)
    clean, _ = stepped(make, Fault(), 2)
    raised = 0
    for phase in phases_of(make()):
        times = reached.seen[phase] + 1
        for at in range(2 * times // 3):
            fault = Fault(phase, at)
            found, made = stepped(make, fault, 4)
            early = at < times // 3
            assert fault.raised
            if early:
                assert found == clean, (phase, at)
            assert [update.retries for update in made] == ([1, 0, 0] if early else [0, 1, 0]), (phase, at)
            assert [update.rows for update in made] == [ROWS] * 3
            if not early:
                assert found == first_coarse(make), (phase, at)
            raised += 1
    assert raised >= 6 * 2 * 2


COARSE = {}


def first_coarse(make):
    """What a run leaves behind whose first update was cut into four rows, and the others into two."""
    if make not in COARSE:
        accumulator, left = prepared(make, Fault(), rows=4)
        accumulator.step(batch())
        accumulator._cutting.micro_batch = wb.Rows(2)
        for _ in range(2):
            accumulator.step(batch())
        COARSE[make] = left()
    return COARSE[make]


@pytest.mark.parametrize("what", ["buffers", "random state"])
@pytest.mark.parametrize("name", MODELS)
def test_the_comparison_sees_what_is_not_rolled_back(name, what, monkeypatch):
    """Beside the test above: it fails where one of the two is forgotten."""
    path = "_Kept.put_back_buffers" if what == "buffers" else "RandomState.restore"
    monkeypatch.setattr(f"wholebatch.engine.transaction.{path}", lambda *_: None)
    clean, _ = stepped(MODELS[name], Fault(), 2)
    assert stepped(MODELS[name], Fault("loss", 1), 4)[0] != clean
