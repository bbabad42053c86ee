"""The protocol of ranks that meet, with threads in the place of ranks: what each says, and what comes back."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wholebatch as wb
from menagerie import numbers
from wholebatch.engine.meetings.call import Call, Site
from wholebatch.engine.meetings.company import Again
from wholebatch.engine.meetings.far import Far, RankFailedError
from wholebatch.engine.meetings.joined import run_joined
from wholebatch.engine.meetings.moving import Moving
from wholebatch.engine.meetings.reach import Near

CPU = torch.device("cpu")


class Talk:
    """A wire between threads."""

    def __init__(self, rank: int, said: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.ranks, self._said, self._barrier = rank, len(said), said, barrier

    def gather(self, what: Any) -> list[Any]:
        self._said[self.rank] = what
        self._barrier.wait(20)
        heard = list(self._said)
        self._barrier.wait(20)
        return heard

    side_by_side = gather

    def add_up(self, tensor: Tensor) -> None:
        tensor.copy_(torch.stack(self.gather(tensor.clone())).sum(0))

    def wait(self, _work: None) -> None:
        pass

    def take_from(self, rank: int, tensor: Tensor) -> None:
        tensor.copy_(self.gather(tensor.clone())[rank])


def on_ranks(run: Callable[[Talk], Any], ranks: int = 2) -> list[Any]:
    """What a function returns, or raises, on each of several ranks."""
    said: list[Any] = [None] * ranks
    barrier = threading.Barrier(ranks)

    def one(rank: int) -> Any:
        try:
            return run(Talk(rank, said, barrier))
        except (Exception, Again) as error:
            return error

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, range(ranks)))


def far(talk: Talk, cut: Any, micro_batches: int, model: nn.Module | None = None) -> Far:
    return Far(talk, cut, micro_batches, model or nn.Linear(1, 1), CPU, lambda: 1)  # type: ignore[arg-type]


def call_of(value: Any, kind: str = "wb.gather", line: int = 1, beside: Any = None) -> Call:
    return Call(kind, Site("loss.py", line), value, lambda values, *_: values, beside)


def loss_of(x: Tensor, kept: Tensor) -> Tensor:
    """Two meetings of which the second needs the first, with numbers, masks and whole numbers at their side."""
    everyone = wb.gather(x)
    y = (x @ everyone.T).softmax(1) @ everyone
    counted = wb.gather(kept).sum() + wb.sum_over_batch(len(x))
    total = wb.sum_over_batch((y * kept.unsqueeze(1)).sum(0))
    return ((y - total / counted) * (1 + wb.own_rows(x).unsqueeze(1))).square().sum()


@pytest.mark.parametrize("idle", [False, True])
def test_gradients_come_back_to_the_rank_that_brought_the_rows(idle):
    whole = numbers(7, 3).requires_grad_()
    kept = torch.arange(7) % 3 > 0
    loss_of(whole, kept).backward()
    cuts = [[range(2), range(2, 5)], [] if idle else [range(2)]]
    if idle:
        cuts[0].append(range(5, 7))

    def rank(talk: Talk) -> Tensor:
        model = nn.BatchNorm1d(3)
        model.running_mean.fill_(talk.rank)
        own = cuts[talk.rank]
        start = 5 * talk.rank
        x = numbers(7, 3)[start : start + sum(map(len, own))].requires_grad_()
        mine = kept[start : start + len(x)]
        reach = far(talk, own, len(own), model)
        reach.open()
        if own:
            runs = [lambda part=part: loss_of(x[list(part)], mine[list(part)]) for part in own]
            losses, _ = run_joined(runs, reach, model=model, device=CPU, moving=Moving(model))
            values, gradients = reach.roots()
            torch.autograd.backward([*losses, *values], [*(torch.ones_like(loss) for loss in losses), *gradients])
            reach.close()
        assert reach.is_over
        assert float(model.running_mean[0]) == (0.0 if idle else talk.rank)
        return x.grad if own else torch.zeros(0, 3)

    found = torch.cat(on_ranks(rank))
    torch.testing.assert_close(found, whole.grad, rtol=1e-12, atol=1e-12)


def test_sums_of_gradients_at_the_end_of_a_first_pass():
    def rank(talk: Talk) -> list[Any]:
        reach = far(talk, [range(1)], 1)
        reach.open()
        like = torch.zeros(2, dtype=torch.bfloat16)
        nobody = reach.add_up(None, like)
        some = reach.add_up(torch.ones(2) if talk.rank else None, like)
        reach.end()
        reach.close()
        return [nobody, some.tolist(), reach.roots()]

    assert on_ranks(rank) == [[None, [1.0, 1.0], ([], [])]] * 2


def test_everybody_idle_is_over_at_once():
    def rank(talk: Talk) -> list[Any]:
        reach = far(talk, [], 0)
        reach.open()
        return list(reach.rows)

    assert on_ranks(rank) == [[], []]


def test_unknown_rows_stay_unknown_on_all_ranks():
    def rank(talk: Talk) -> list[Any]:
        reach = far(talk, None if talk.rank else [range(2)], 1)
        reach.open()
        return [*reach.rows, reach.order.cut]

    assert on_ranks(rank) == [[None, None]] * 2


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (lambda reach: reach.end(), "rank 0 meets at loss.py:1 (wb.gather), rank 1 ends"),
        (lambda reach: reach.add_up(None, torch.ones(1)), "rank 1 is done"),
        (
            lambda reach: reach.hear([call_of(torch.ones(1), line=2)], [torch.ones(1)], graph=False),
            "rank 0 meets at loss.py:1 (wb.gather), rank 1 meets at loss.py:2 (wb.gather)",
        ),
    ],
)
def test_ranks_that_are_elsewhere_are_told_where(other, found):
    def rank(talk: Talk) -> Any:
        reach = far(talk, [range(1)], 1)
        reach.open()
        try:
            return reach.hear([call_of(torch.ones(1))], [torch.ones(1)], graph=False) if not talk.rank else other(reach)
        finally:
            reach.say_failed()  # nobody listens any more
            reach.say_again("late")

    for error in on_ranks(rank):
        assert isinstance(error, wb.MeetingError)
        assert found in str(error)


@pytest.mark.parametrize(
    ("say", "kind"), [(lambda reach: reach.say_failed(), RankFailedError), (lambda reach: reach.say_again("w"), Again)]
)
def test_failures_and_news_are_heard_in_place_of_the_next_message(say, kind):
    def rank(talk: Talk) -> Any:
        reach = far(talk, [range(1)], 1)
        reach.open()
        return say(reach) if talk.rank else reach.end()

    first, second = on_ranks(rank)
    assert isinstance(first, kind)
    assert second is None


def test_who_has_news_hears_of_a_failure_first():
    def rank(talk: Talk) -> Any:
        reach = far(talk, [range(1)], 1)
        reach.open()
        return reach.say_failed() if talk.rank else reach.say_again("why")

    first, second = on_ranks(rank)
    assert isinstance(first, RankFailedError)
    assert second is None


def test_what_lies_beside_and_odd_dtypes_travel():
    values = [torch.ones(2, dtype=torch.bool), torch.tensor(1.5 + 2j), torch.zeros(0, 3), 7]

    def rank(talk: Talk) -> Any:
        reach = far(talk, None, 1)
        reach.open()
        found = []
        for value in values:
            brought = reach.hear([call_of(value, beside=(torch.tensor(talk.rank), [1]))], [value], graph=True)
            found.append(brought)
        return found

    for found in on_ranks(rank):
        for brought, value in zip(found, values, strict=True):
            for each in brought.values:
                assert torch.equal(each, value) if isinstance(value, Tensor) else each == value
            assert [int(count) for count, _ in brought.beside] == [0, 1]


def test_near_is_a_group_of_one():
    near = Near(None, 2)
    near.open()
    near.end()
    near.say_again("nobody")
    near.close()
    assert list(near.rows) == [None, None]
    assert near.add_up(None, torch.ones(1)) is None
    assert near.roots() == ([], [])
