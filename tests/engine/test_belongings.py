"""What a micro-batch puts into the modules of a model is its own while others meet there."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F  # noqa: N812

import wholebatch as wb
from coupled import ROWS, LooksAround, error_of
from menagerie import Animal, regression
from properties import sgd, stepped

FP64 = 1e-12
pytestmark = pytest.mark.usefixtures("no_thread_is_left")


class LeavesBehind(nn.Module):
    """Reads at its end what it has left behind before layers that meet, in some way."""

    def __init__(self, way, normed):
        super().__init__()
        self.way, self.normed = way, normed
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)
        self.norms = nn.ModuleList(wb.exact_batch_norm(nn.BatchNorm1d(4)) for _ in range(2 if normed else 0))
        self.extra, self.extras, self.calls = None, {}, 0
        found = {}
        self.first.register_forward_hook(lambda *passed: found.update(features=passed[-1]))
        self.found = lambda: found["features"]

    def forward(self, x):
        h = self.first(x)
        self.calls += 1
        self.extra = h.square().mean(1)
        self.extras["first"] = h.square().mean(1)
        self.pieces = [h.square().mean(1)]
        for norm in self.norms:
            h = norm(h)
        if not self.normed:
            h = h - wb.gather(h).mean(0)
        said = {
            "attribute": lambda: self.extra,
            "dict": lambda: self.extras.pop("first"),
            "list": lambda: self.pieces[0],
            "hook": lambda: self.found().square().mean(1),
        }[self.way]()
        return self.last(torch.tanh(h)), said


def with_what_was_left(model, batch):
    said, extra = model(batch["x"])
    return F.mse_loss(said, batch["y"]) + extra.mean()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("way", ["attribute", "dict", "list", "hook"])
@pytest.mark.parametrize("lockstep", ["auto", "joined"])
def test_what_a_micro_batch_leaves_in_a_module_is_its_own(lockstep, way, normed):
    animal = Animal(lambda: LeavesBehind(way, normed), regression, with_what_was_left)
    for rows in 1, 4:
        assert error_of(animal, stepped(animal, wb.Rows(rows), lockstep=lockstep)) <= FP64


class WatchesItself(nn.Module):
    """A hook that is a method: what it keeps in an attribute is its micro-batch's own, a buffer is that of all."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)
        self.kept = {}
        self.register_buffer("mean", torch.zeros(4))
        self.first.register_forward_hook(self.keep)

        def another(_module, _inputs, output):
            return late if output is None else None  # noqa: F821 - a variable that is gone

        self.first.register_forward_hook(another)
        late = None
        del late

    def keep(self, _module, _inputs, output):
        self.kept["features"] = output

    def forward(self, x):
        h = self.first(x)
        mean = wb.sum_over_batch(h.sum(0)) / wb.sum_over_batch(len(h))
        if 0 in wb.own_rows(x):
            self.mean = torch.lerp(self.mean, mean.detach(), 0.1)
        everyone = wb.gather(x)
        return self.last(torch.tanh(h - mean)), self.kept["features"] * everyone.mean()


@pytest.mark.parametrize("lockstep", ["auto", "joined"])
def test_what_a_hook_that_is_a_method_keeps_and_a_buffer_that_is_all_of_theirs(lockstep):
    def loss_fn(model, batch):
        said, kept = model(batch["x"])
        return F.mse_loss(said, batch["y"]) + kept.square().mean()

    animal = Animal(WatchesItself, regression, loss_fn)
    assert error_of(animal, stepped(animal, wb.Rows(4), lockstep=lockstep)) <= FP64
    means = []
    for rows in ROWS, 4:
        model = animal.model()
        options = {"micro_batch": wb.Rows(rows), "lockstep": lockstep, "check": None}
        wb.Accumulator(model, sgd(model.parameters()), loss_fn, **options).step(regression(ROWS, torch.float64))
        means.append(model.mean)
    torch.testing.assert_close(*means, rtol=1e-12, atol=1e-12)


def test_numbers_that_a_forward_pass_counts_are_counted_for_all_micro_batches():
    model = LeavesBehind("attribute", normed=True).double()
    options = {"micro_batch": wb.Rows(4), "check": None}
    wb.Accumulator(model, sgd(model.parameters()), with_what_was_left, **options).step(regression(ROWS, torch.float64))
    assert model.calls == 3


def with_other_weights(model, batch):
    """As in meta-learning: the model runs with weights that were made of its own."""

    def through(x):
        weights = {name: weight * 1.5 for name, weight in model.named_parameters()}
        return torch.func.functional_call(model, weights, (x,))

    return F.mse_loss(through(batch["x"]), batch["y"])


def normed():
    return wb.exact_batch_norm(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)))


@pytest.mark.parametrize("build", [LooksAround, normed])
@pytest.mark.parametrize("lockstep", ["auto", "replay", "joined"])
def test_micro_batches_that_meet_while_a_model_runs_with_other_weights(lockstep, build):
    """Each finds its own again, and at the end the model has those that it had."""
    animal = Animal(build, regression, with_other_weights)
    assert error_of(animal, stepped(animal, wb.Rows(4), lockstep=lockstep)) <= FP64
    model = animal.model()
    weights = list(model.parameters())
    wb.Accumulator(model, sgd(weights), with_other_weights, micro_batch=wb.Rows(4), lockstep=lockstep).step(
        regression(ROWS, torch.float64)
    )
    assert all(now is before for now, before in zip(model.parameters(), weights, strict=True))


def test_an_error_while_a_model_runs_with_other_weights_leaves_those_that_it_had():
    model = normed().double()
    weights, passes = list(model.parameters()), []
    model[2].register_forward_hook(lambda *_: passes.append(1) if len(passes) < 2 else [].pop())
    accumulator = wb.Accumulator(model, sgd(weights), with_other_weights, micro_batch=wb.Rows(4), check=None)
    with pytest.raises(IndexError):
        accumulator.step(regression(ROWS, torch.float64))
    assert all(now is before for now, before in zip(model.parameters(), weights, strict=True))


def test_weights_of_16_bits_stay_too_while_a_model_runs_with_others():
    model = normed().bfloat16()
    weights = list(model.parameters())
    accumulator = wb.Accumulator(model, sgd(weights), with_other_weights, micro_batch=wb.Rows(4), check=None)
    assert accumulator.step(regression(ROWS, torch.bfloat16)).applied
    assert all(now is before for now, before in zip(model.parameters(), weights, strict=True))
