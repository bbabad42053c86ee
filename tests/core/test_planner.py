"""From what training needs and a budget to a plan, as pure arithmetic.

The plans of ``golden/plans.txt`` are rewritten with ``WHOLEBATCH_GOLDEN=1 pytest tests/core/test_planner.py``.
"""

import json
import os
from pathlib import Path

import pytest

from wholebatch.core.need import Need, Passes
from wholebatch.core.planner import Planner, Task
from wholebatch.core.sizes import candidates, evened, fastest, line, usable
from wholebatch.core.split import Rows, Tokens
from wholebatch.core.trace import Trace
from wholebatch.core.ways import Ladder, Way

GOLDEN = Path(__file__).parent / "golden" / "plans.txt"
MIB = 1 << 20


def need(per_row=MIB, weights=10 * MIB, *, step=20 * MIB, per_token=0, scratch=None):
    """A model whose activations are a line in the rows, and in their tokens."""

    def run(rows, length):
        kept = rows * (per_row + per_token * length)
        first = (kept, weights, -kept)
        second = (kept, -kept)
        return Trace(first + second, ("activations", "gradients", "activations", "activations", "activations"), 3)

    lengths = (0,) if not per_token else (1, 50, 100)
    passes = Passes.of({(rows, length): run(rows, length) for rows in (2, 4) for length in lengths})
    return Need({"weights": weights, "optimizer state": 2 * weights}, passes, step, scratch)


AS_IS = Way("as it is", need())
BF16 = Way("bf16", need(MIB // 2))
RECOMPUTING = Way("checkpointing", need(MIB // 8), ("blocks.0", "blocks.1"), 4 / 3)
HUGE = Way("as it is", need(500 * MIB))
HUGE_RECOMPUTING = Way("checkpointing", need(20 * MIB), ("blocks.0", "blocks.1"), 4 / 3)


def even(sizes, _way=None):
    """Every row takes as long, and a pass itself as much as ten rows."""
    return {rows: 0.01 * rows + 0.1 for rows in sizes}


def slower_when_large(sizes, _way=None):
    return {rows: 0.01 * rows * (1.5 if rows > 20 else 1.0) for rows in sizes}


LENGTHS = tuple([100] * 4 + [10] * 60)

PLANS = {
    "it fits as a whole": Planner(Task(64, 200 * MIB), [AS_IS, BF16, RECOMPUTING], even),
    "it is cut": Planner(Task(512, 200 * MIB), [AS_IS, BF16, RECOMPUTING], even, ("measured on two rows.",)),
    "smaller is faster": Planner(Task(512, 200 * MIB), [AS_IS], slower_when_large),
    "nobody timed it": Planner(Task(512, 200 * MIB), [AS_IS]),
    "one row fits only if it recomputes": Planner(
        Task(512, 200 * MIB),
        [HUGE, HUGE_RECOMPUTING],
        ladder=Ladder(2, lambda count: HUGE_RECOMPUTING if count == 2 else None),
    ),
    "one row does not fit": Planner(Task(512, 200 * MIB), [HUGE]),
    "one row would fit otherwise": Planner(Task(512, 200 * MIB), [HUGE, BF16]),
    "weights do not fit": Planner(Task(512, 45 * MIB), [AS_IS]),
    "lengths vary": Planner(
        Task(64, 200 * MIB, LENGTHS, len), [Way("as it is", need(1000, per_token=100_000))], lambda *_: {}
    ),
}


@pytest.fixture(scope="module")
def plans():
    return {name: planner.plan() for name, planner in PLANS.items()}


def test_plans_are_those_of_the_golden_file(plans):
    said = "\n\n".join(f"=== {name}\n{plan}" for name, plan in plans.items()) + "\n"
    if os.environ.get("WHOLEBATCH_GOLDEN"):
        GOLDEN.write_text(said, encoding="ascii")
    assert said == GOLDEN.read_text(encoding="ascii")


def test_a_batch_that_fits_is_not_cut(plans):
    plan = plans["it fits as a whole"]
    assert plan.fits
    assert (plan.micro_batch, plan.micro_batches) == (Rows(64), 1)
    assert "nothing is cut" in plan.reasons[0]
    assert plan.peak_bytes == 30 * MIB + 64 * MIB + 10 * MIB == plan.peak_at(64)


@pytest.mark.parametrize("budget", [60, 75, 120, 199, 400])
@pytest.mark.parametrize("rows", [7, 64, 513])
def test_no_plan_exceeds_its_budget_and_one_row_more_would(budget, rows):
    plan = Planner(Task(rows, budget * MIB), [AS_IS]).plan()
    assert plan.fits
    assert plan.peak_bytes <= budget * MIB
    assert plan.peak_bytes == plan.peak_at(plan.micro_batch.rows)
    largest = plan.largest()
    assert largest >= plan.micro_batch.rows
    assert largest == rows or plan.peak_at(largest + 1) > budget * MIB
    assert plan.micro_batches == -(-rows // plan.micro_batch.rows)
    if largest < rows:  # as few micro-batches as the margin lets
        assert plan.micro_batches <= -(-rows // max(1, largest - 3))


def test_the_bound_sees_a_forgotten_kind():
    """Beside the test above: without the optimizer's state a plan goes over the budget."""
    forgetful = Need({"weights": 10 * MIB}, AS_IS.need.passes, 20 * MIB)
    plan = Planner(Task(512, 100 * MIB), [Way("as it is", forgetful)]).plan()
    assert AS_IS.need.peak(plan.micro_batch.rows) > 100 * MIB


def test_the_clock_chooses_among_what_fits(plans):
    assert plans["it is cut"].micro_batches < plans["smaller is faster"].micro_batches
    assert plans["smaller is faster"].micro_batch.rows <= 40
    assert plans["nobody timed it"].seconds is None
    assert plans["nobody timed it"].rows_per_second is None
    assert plans["nobody timed it"].epoch_seconds(1000) is None


def test_how_long_an_epoch_is(plans):
    plan = plans["it is cut"]
    assert plan.epoch_seconds(5120) == pytest.approx(10 * plan.seconds)
    assert plan.seconds == pytest.approx(5.12 + 0.1 * plan.micro_batches, rel=1e-6)
    assert plan.rows_per_second == pytest.approx(512 / plan.seconds)


def test_sixteen_bits_are_proposed_and_not_chosen(plans):
    plan = plans["it is cut"]
    assert plan.precision == "fp32"
    assert any("proposed and not chosen" in reason for reason in plan.reasons)
    assert not any("proposed" in reason for reason in plans["it fits as a whole"].reasons)


def test_recomputing_is_chosen_only_where_one_row_does_not_fit(plans):
    assert plans["it is cut"].checkpointing == ()
    plan = plans["one row fits only if it recomputes"]
    assert plan.fits
    assert plan.checkpointing == ("blocks.0", "blocks.1")
    assert plan.peak_bytes <= 200 * MIB


def planned_by(seconds_of):
    """A plan of 64 rows of which 16 fit as they are, and all if two blocks recompute; the clock is made up."""
    asked = []

    def clock(sizes, way):
        asked.append(way.name)
        return {rows: seconds_of(rows, way) for rows in sizes}

    ladder = Ladder(2, lambda count: RECOMPUTING if count == 2 else None)
    return Planner(Task(64, 57 * MIB), [AS_IS, RECOMPUTING], clock, ladder=ladder).plan(), asked


def test_recomputing_is_chosen_where_larger_micro_batches_win_more_than_it_costs():
    """A pass itself takes as long as a hundred rows: one long pass beats several short ones."""
    plan, asked = planned_by(lambda rows, way: (1.0 + 0.01 * rows) * (1.1 if way.blocks else 1.0))
    assert plan.checkpointing == RECOMPUTING.blocks
    assert (plan.micro_batch, plan.micro_batches) == (Rows(64), 1)
    assert asked[-1] == "checkpointing"
    (said,) = [each for each in plan.reasons if "it pays" in each]
    assert said.startswith("If blocks.0 and blocks.1 recompute their activations, 64 rows fit at once")
    assert "35.5 rows a second instead of 13.8" in said


@pytest.mark.parametrize(
    "seconds_of",
    [
        lambda rows, way: 0.01 * rows * (4 / 3 if way.blocks else 1.0),  # a pass costs nothing by itself
        lambda rows, way: (0.02 + 0.01 * rows) * (4 / 3 if way.blocks else 1.0),  # little, and less than is lost
        lambda rows, way: (
            (1.0 + 0.01 * rows) * (5.0 if way.blocks else 1.0)
        ),  # it promised much, and the clock denied it
    ],
    ids=["nothing to win", "little to win", "denied by the clock"],
)
def test_recomputing_is_not_chosen_where_it_does_not_pay(seconds_of):
    plan, _ = planned_by(seconds_of)
    assert plan.fits
    assert plan.checkpointing == ()
    assert (plan.micro_batch, plan.micro_batches) in {(Rows(16), 4), (Rows(1), 64)}
    assert not any("it pays" in each for each in plan.reasons)


def test_no_way_is_made_that_cannot_pay():
    """A guess at what blocks free and cost is enough to leave them out, and the guess leaves out nothing that pays."""
    made = []

    def plan(guess):
        ladder = Ladder(2, lambda count: made.append(count) or RECOMPUTING, guess=guess)
        return Planner(Task(64, 57 * MIB), [AS_IS, RECOMPUTING], lambda sizes, _: dear(sizes), ladder=ladder).plan()

    def dear(sizes):
        return {rows: 1.0 + 0.01 * rows for rows in sizes}

    assert plan(lambda count: (count * MIB / 20, 1.1)).checkpointing == ()  # they would not free enough
    assert plan(lambda count: (count * MIB, 3.0)).checkpointing == ()  # they would take longer than they win
    assert made == []
    assert plan(lambda count: (count * MIB, 1.1)).checkpointing == RECOMPUTING.blocks
    assert made


def test_what_does_not_fit_says_what_would_help(plans):
    assert not plans["one row does not fit"].fits
    assert "activations" in plans["one row does not fit"].reasons[0]
    assert "It would fit with bf16." in plans["one row would fit otherwise"].reasons
    assert "no cut can help" in plans["weights do not fit"].reasons[0]
    assert plans["weights do not fit"].largest() == 0


def test_token_budgets_hold_for_long_rows_and_for_short_ones(plans):
    plan = plans["lengths vary"]
    assert isinstance(plan.micro_batch, Tokens)
    assert plan.micro_batch.tokens >= 100
    for length in (10, 55, 100):
        rows = min(64, plan.micro_batch.tokens // length)
        assert plan.peak_at(rows, length) <= plan.budget_bytes
    assert plan.bytes_per_token is not None
    assert plan.to_dict()["micro_batch"] == {"tokens": plan.micro_batch.tokens}


@pytest.mark.parametrize("budget", range(150, 400, 50))
def test_token_budgets_hold_for_every_length(budget):
    """Lengths that go into the tokens without a rest take most: 8 rows of 126 tokens, where 7 of 127 fit."""
    lengths = tuple(range(16, 128)) * 3
    way = Way("as it is", need(1000, per_token=200_000))
    plan = Planner(Task(336, budget * MIB, lengths, len), [way]).plan()
    assert plan.peak_bytes <= plan.budget_bytes
    shapes = [(plan.micro_batch.tokens // length, length) for length in set(lengths)]
    assert max(plan.peak_at(*shape) for shape in shapes) <= plan.budget_bytes
    longest = [plan.peak_at(rows + 1, 127) for rows, length in shapes if length == 127]
    assert min(longest) > 0.995 * plan.budget_bytes
    if budget == 200:  # a budget of tokens that holds at both ends alone
        ends = max(tokens for tokens in range(127, 4000) if holds(way.need, tokens, budget * MIB, (16, 127)))
        assert not holds(way.need, ends, budget * MIB, range(16, 128))


def holds(need, tokens, budget, lengths):
    return all(need.peak(tokens // length, length) <= budget for length in lengths)


def test_a_micro_batch_that_was_chosen_is_judged():
    fits = Planner(Task(512, 200 * MIB), [AS_IS], even).stated(Rows(8))
    assert (fits.fits, fits.micro_batches, fits.peak_bytes) == (True, 64, 50 * MIB)
    assert "within" in fits.reasons[0]
    assert fits.seconds is not None
    too_much = Planner(Task(512, 200 * MIB), [AS_IS]).stated(Rows(300))
    assert not too_much.fits
    assert "more than" in too_much.reasons[0]
    task = Task(64, 200 * MIB, LENGTHS, len)
    tokens = Planner(task, [Way("as it is", need(1000, per_token=100_000))]).stated(Tokens(200, len))
    assert tokens.fits
    assert tokens.micro_batches == len(Tokens(200, len).cut(LENGTHS))


def test_a_plan_can_be_shown_everywhere(plans):
    for plan in plans.values():
        assert json.loads(json.dumps(plan.to_dict()))["fits"] == plan.fits
        page = plan._repr_html_()
        assert page.count("<svg") == 1
        assert page.count("<div") == page.count("</div>")
    assert "budget" in plans["it is cut"].to_svg()


def test_loose_knowledge_leaves_more_room():
    other = Trace((1, 2, -2), ("activations", "gradients", "activations"), 3)
    loose = Passes.of({(2, 0): other, (4, 0): Trace((1, 2), ("activations", "gradients"), 2)})
    budget = 1000 * MIB
    assert usable(Need({}, loose), budget) < usable(AS_IS.need, budget) < budget
    scratch = Passes.of({(rows, 0): Trace((90 * MIB,), ("scratch",), 1) for rows in (2, 4)})
    assert usable(need(scratch=scratch), budget) < usable(Need({}, loose), budget)


def test_small_choices():
    assert candidates(2) == [1, 2]
    assert fastest({1: 1.0, 2: 1.99, 4: 4.1}) == 1
    assert fastest({1: 1.0, 2: 1.9}) == 2
    assert evened(10, 10) == 10
    assert line({4: 2.0}) == (0.0, 0.5)
    assert line({1: 2.0, 4: 1.0}) == (1.0, 0.0)
