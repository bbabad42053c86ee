"""What a window takes on many ranks: the arithmetic, against the same thing run through event by event."""

import json

import pytest
from test_planner import AS_IS, MIB, even, need

from wholebatch.core.communication import BUCKET_BYTES, Ranks
from wholebatch.core.errors import ConfigError
from wholebatch.core.link import Link
from wholebatch.core.plan import Plan
from wholebatch.core.planner import Planner, Task
from wholebatch.core.spread import Spread
from wholebatch.core.ways import Way


def window(**stated):
    told = {
        "ranks": 8,
        "link": Link(1e9, 1e-4),
        "rows": 64,
        "micro_batches": 4,
        "gradient_bytes": 200 * MIB,
        "compute_seconds": 2.0,
        "held": {"weights": 100 * MIB, "optimizer state": 300 * MIB},
    }
    return Ranks(**told | stated)


def played(ranks, steps=200_000):
    """Play the last backward pass tick by tick: buckets are filled at an even rate, and sent one after the other."""
    backward = 2 / 3 * ranks.compute_seconds / ranks.micro_batches
    sizes = [BUCKET_BYTES] * (ranks.gradient_bytes // BUCKET_BYTES)
    sizes += [ranks.gradient_bytes % BUCKET_BYTES] * (ranks.gradient_bytes % BUCKET_BYTES > 0)
    tick = backward / steps
    now, sent, busy_until = 0.0, 0, 0.0
    while sent < len(sizes):
        now += tick
        made = min(ranks.gradient_bytes, ranks.gradient_bytes * now / backward)
        if now >= busy_until and made >= sum(sizes[: sent + 1]) - 1:
            busy_until = now + ranks.link.all_reduce(sizes[sent], ranks.ranks)
            sent += 1
    return busy_until - backward


@pytest.mark.parametrize("bandwidth", [1e8, 1e9, 1e10])
@pytest.mark.parametrize("gradient", [MIB, 30 * MIB, 200 * MIB, 1000 * MIB + 7])
@pytest.mark.parametrize("ranks", [2, 64])
def test_what_is_exposed_is_what_is_left_when_the_backward_pass_is_over(bandwidth, gradient, ranks):
    told = window(link=Link(bandwidth, 1e-4), gradient_bytes=gradient, ranks=ranks)
    assert told.exposed_seconds == pytest.approx(played(told), rel=1e-3, abs=2e-5)
    assert told.exposed_seconds <= told.reduction_seconds + 1e-12
    assert told.window_seconds == pytest.approx(told.compute_seconds + told.exposed_seconds)


def test_the_comparison_sees_a_reduction_that_is_not_hidden():
    told = window(gradient_bytes=200 * MIB)
    assert told.reduction_seconds > 1.5 * played(told)


def test_adding_up_after_each_micro_batch_costs_it_each_time():
    told = window(micro_batches=32, link=Link(1e8))
    assert told.each_seconds - told.compute_seconds == pytest.approx(32 * told.exposed_seconds)
    assert window(micro_batches=1).each_seconds == window(micro_batches=1).window_seconds


def test_ranks_speed_up_as_far_as_the_link_lets_them():
    assert window(link=Link(1e15)).speedup == pytest.approx(8, rel=1e-4)
    assert window(link=Link(1e6)).speedup < 0.1
    speeds = [window(ranks=ranks, compute_seconds=16 / ranks).speedup for ranks in (2, 4, 8, 64)]
    assert speeds == sorted(speeds)
    assert speeds[-1] < 64


def test_sharing_trades_memory_for_communication():
    whole, gathered, parts = window(ranks=4, micro_batches=8).sharings
    assert whole.held_bytes == (100 + 200 + 300) * MIB
    assert parts.held_bytes == whole.held_bytes / 4
    assert gathered.held_bytes == 300 * MIB + 300 * MIB / 4
    assert whole.sent_bytes == 2 * 3 / 4 * 200 * MIB == window(ranks=4).sent_bytes
    assert gathered.sent_bytes == 3 / 4 * 300 * MIB
    assert parts.sent_bytes == 3 / 4 * 8 * 400 * MIB
    assert parts.seconds == pytest.approx(parts.sent_bytes / 1e9)
    assert window(held=None).sharings == ()


def test_what_is_not_known_is_not_invented():
    no_link = window(link=None)
    assert no_link.reduction_seconds is no_link.exposed_seconds is no_link.window_seconds is no_link.speedup is None
    assert "No bandwidth" in " ".join(no_link.reasons())
    assert no_link.sharings[0].seconds is None
    assert [name for name, _, _ in no_link.table()] == ["compute"]
    not_timed = window(compute_seconds=None)
    assert not_timed.exposed_seconds == pytest.approx(not_timed.reduction_seconds)
    assert not_timed.window_seconds is not_timed.each_seconds is not_timed.speedup is None
    assert "No pass was timed" in " ".join(not_timed.reasons())
    assert [name for name, _, _ in not_timed.table()] == ["reduction", "exposed"]


def test_reasons_say_what_is_hidden_and_what_waits():
    assert "hidden behind the last backward pass" in " ".join(window().reasons())
    assert "all of the reduction is exposed" in " ".join(window(gradient_bytes=MIB).reasons())
    assert "after each" not in " ".join(window(micro_batches=1).reasons())
    assert "wait 9" in " ".join(window(link=Link(1e7)).reasons())
    assert "of their time" not in " ".join(window(link=Link(1e12)).reasons())


@pytest.fixture(scope="module")
def plan():
    spread = Spread.of(500, 8, "1Gbit/s", "1ms")
    task = Task(spread.rows_each, 80 * MIB, shared=True)
    return spread(Planner(task, [AS_IS], even).plan())


def test_a_plan_on_ranks_is_that_of_each(plan):
    assert isinstance(plan, Plan)
    assert (plan.logical_batch, plan.share, plan.ranks.ranks) == (500, 63, 8)
    alone = Planner(Task(63, 80 * MIB), [Way("as it is", need())], even).plan()
    assert (plan.micro_batch, plan.micro_batches) == (alone.micro_batch, alone.micro_batches)
    assert (plan.peak_bytes, plan.largest(), plan.peak_at(63)) == (alone.peak_bytes, alone.largest(), alone.peak_at(63))
    assert plan.ranks.compute_seconds == alone.seconds
    assert plan.seconds == plan.ranks.window_seconds > alone.seconds
    assert plan.rows_per_second == pytest.approx(500 / plan.ranks.window_seconds)
    assert plan.ranks.gradient_bytes == 10 * MIB


def test_a_plan_on_ranks_is_shown_everywhere(plan):
    said = str(plan)
    assert "500 rows, 63 on each of 8 ranks, " in said
    assert "The whole share of a rank, 63 rows, would take" in said
    assert "over a link of 125 MB/s and 1 ms:" in said
    assert 'FSDP2, communication="each"' in said
    assert json.loads(json.dumps(plan.to_dict()))["ranks"]["link"]["bandwidth"] == 125e6
    page = plan._repr_html_()
    assert "exposed" in page
    assert "FSDP2" in page


def test_one_rank_is_as_ever():
    plan = Planner(Task(64, 80 * MIB), [AS_IS], even).plan()
    assert Spread.of(64, 1, None, 0.0)(plan) is plan
    assert plan.to_dict()["ranks"] is None
    assert plan.share == 64


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ((64, 0, None, 0), "ranks=0 is no number"),
        ((64, True, None, 0), "ranks=True is no number"),
        ((64, "8", None, 0), "ranks='8' is no number"),
        ((4, 8, None, 0), "some would have none"),
        ((64, 1, "1GB/s", 0), "there is one rank"),
        ((64, 1, None, "1ms"), "there is one rank"),
        ((64, 8, None, "1ms"), "without a bandwidth"),
        ((64, 8, "1GB", 0), "is not a bandwidth"),
    ],
)
def test_what_cannot_be_spread(asked, found):
    with pytest.raises(ConfigError, match=found):
        Spread.of(*asked)
