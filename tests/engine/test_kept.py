"""The last micro-batch of a replay runs once, unless its graph is no good for it; the update is the same."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations, parametrize

import wholebatch as wb
from menagerie import Animal
from properties import change, relative_error, stepped, undivided
from wholebatch.engine.fit.timeline import Timeline

FP64 = 1e-12
ROWS, CUT = 11, wb.Rows(4)  # three micro-batches, the last one with three rows


def vectors(rows, dtype):
    draw = torch.Generator().manual_seed(0)
    return {"x": torch.randn(rows, 6, generator=draw, dtype=torch.float64).to(dtype)}


def against_all(model, batch):
    mine = model(batch["x"])
    return nn.functional.cross_entropy(mine @ wb.gather(mine).T, wb.own_rows(mine))


class Counting:
    """A loss that notes the rows of every forward pass."""

    def __init__(self, loss_fn):
        self.loss_fn = loss_fn
        self.rows = []

    def __call__(self, model, batch):
        self.rows.append(len(batch["x"]))
        return self.loss_fn(model, batch)


def passes_and_error(loss_fn, build=lambda: nn.Linear(6, 4), **options):
    """Return the rows of the forward passes of one update, and how far it is from that of the undivided batch."""
    counting = Counting(loss_fn)
    animal, counted = Animal(build, vectors, loss_fn), Animal(build, vectors, counting)
    batch = vectors(ROWS, torch.float64)
    found = change(counted, stepped(counted, CUT, lockstep="replay", **options), [batch])
    return counting.rows, relative_error(found, change(animal, undivided(animal), [batch]))


def test_the_last_one_runs_once():
    rows, error = passes_and_error(against_all)
    assert rows == [4, 4, 4, 3, 4, 4]  # the first one finds that they meet; the window is made again
    assert error <= FP64


def test_one_micro_batch_alone_in_its_window_runs_once():
    batch = vectors(4, torch.float64)
    counting = Counting(against_all)
    animal = Animal(lambda: nn.Linear(6, 4), vectors, counting)
    change(animal, stepped(animal, wb.Rows(2), lockstep="replay"), [batch, vectors(2, torch.float64)])
    assert counting.rows == [2, 2, 2, 2, 2]


class _UsesUp(torch.autograd.Function):
    """An identity whose backward pass writes into what it has saved, as some fused kernels do."""

    @staticmethod
    def forward(ctx, x):
        ctx.factor = torch.ones_like(x)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return ctx.factor.mul_(2).mul(gradient) / 2


def used_up(model, batch):
    mine = model(batch["x"])
    similar = _UsesUp.apply(mine @ wb.gather(mine).T)
    return nn.functional.cross_entropy(similar, wb.own_rows(mine))


def test_a_backward_pass_that_uses_up_what_it_saved_goes_once():
    rows, error = passes_and_error(used_up)
    assert rows[-3:] == [4, 4, 3]
    assert error <= FP64


def test_the_bound_sees_a_backward_pass_that_went_twice(monkeypatch):
    monkeypatch.setattr("wholebatch.engine.meetings.kept._is_of_others", lambda _: False)
    assert passes_and_error(used_up)[1] > 1e-2


def test_such_a_function_before_the_meeting_does_not_matter():
    def loss_fn(model, batch):
        mine = _UsesUp.apply(model(batch["x"]))
        return nn.functional.cross_entropy(mine @ wb.gather(mine).T, wb.own_rows(mine))

    def direct(model, batch):
        mine = _UsesUp.apply(model(batch["x"]))
        return wb.gather(mine).square().sum() + 0 * mine.sum()

    for each in (loss_fn, direct):
        rows, error = passes_and_error(each)
        assert rows[-3:] != [4, 4, 3]
        assert error <= FP64


def test_weights_that_are_kept_for_a_block_learn_in_every_micro_batch():
    def loss_fn(model, batch):
        with parametrize.cached():
            return against_all(model, batch)

    rows, error = passes_and_error(loss_fn, lambda: parametrizations.weight_norm(nn.Linear(6, 4)))
    assert rows[-3:] == [4, 4, 3]
    assert error <= FP64


def test_the_bound_sees_weights_that_were_kept_without_a_graph(monkeypatch):
    def loss_fn(model, batch):
        with parametrize.cached():
            return against_all(model, batch)

    monkeypatch.setattr("wholebatch.engine.meetings.kept.parametrize", object())
    assert passes_and_error(loss_fn, lambda: parametrizations.weight_norm(nn.Linear(6, 4)))[1] > 1e-2


def test_a_need_for_what_met_before_is_seen_in_the_last_one_too():
    """Only its second meeting depends on its first one, so that nothing but its graph tells."""

    def loss_fn(model, batch):
        mine = model(batch["x"])
        everyone = wb.gather(mine)
        brought = everyone[wb.own_rows(mine)] if len(mine) == 3 else mine.detach() + mine - mine.detach()
        return (wb.gather(brought) @ mine.T).logsumexp(0).mean()

    with pytest.raises(wb.MeetingError, match="needs the gradient of what met before"):
        passes_and_error(loss_fn)


@pytest.mark.parametrize("changed", [3, 4])
def test_what_was_brought_is_not_to_be_changed(changed):
    def loss_fn(model, batch):
        mine = model(batch["x"])
        everyone = wb.gather(mine)
        if len(mine) == changed:
            mine += 1
        return (mine @ everyone.detach().T).logsumexp(1).mean() + everyone.square().mean()

    with pytest.raises(wb.MeetingError, match="was changed after it had been brought"):
        passes_and_error(loss_fn)


def test_a_term_of_nothing_but_the_weights_counts_in_it():
    def loss_fn(model, batch):
        return against_all(model, batch) + model.weight.square().sum()

    rows, error = passes_and_error(loss_fn)
    assert rows[-3:] == [3, 4, 4]
    assert error <= FP64


def test_weights_learn_again_after_an_error():
    def loss_fn(model, batch):
        mine = wb.gather(model(batch["x"]))
        if len(batch["x"]) == 3:
            raise KeyError("a row")
        return mine.square().sum()

    model = nn.Linear(6, 4).double()
    accumulator = wb.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, micro_batch=CUT, check=None
    )
    with pytest.raises(KeyError):
        accumulator.step(vectors(ROWS, torch.float64))
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("way", ["step", "updates"])
def test_the_attempt_in_which_they_were_found_to_meet_is_let_go(way):
    """Also without a run of Python's collector, which would find it in a circle with what ended it."""
    held = []

    def loss_fn(model, batch):
        mine = model(batch["x"])
        held.append(weakref.ref(mine))
        return wb.gather(mine).square().mean()

    model = nn.Linear(6, 4).double()
    accumulator = wb.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, micro_batch=CUT, check=None
    )
    batch = vectors(ROWS, torch.float64)
    gc.disable()
    try:
        if way == "step":
            accumulator.step(batch)
        else:
            list(accumulator.updates([batch, batch], micro_batches=2))
        assert len(held) > 3
        assert held[0]() is None
    finally:
        gc.enable()


def test_memory_is_that_of_one_micro_batch_and_what_met():
    width, rows, layers = 256, 64, 6
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def peak(loss_fn, micro_batches, **options):
        batch = {"x": torch.randn(rows * micro_batches, width)}
        accumulator = wb.Accumulator(model, optimizer, loss_fn, micro_batch=wb.Rows(rows), check=None, **options)
        accumulator.step(batch)
        with Timeline(torch.device("cpu")) as timeline:
            accumulator.step(batch)
        return timeline.peak_bytes

    def apart(model, batch):
        return model(batch["x"]).square().mean()

    def together(model, batch):
        return wb.gather(model(batch["x"])).square().mean()

    bound = 1.05 * (peak(apart, 4) + 3 * 4 * width * rows * 4)
    assert peak(together, 4) <= bound
    assert peak(together, 4, lockstep="joined") > bound
