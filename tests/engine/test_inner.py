"""A gradient that is taken inside the loss, while micro-batches meet, is that of all rows or is refused."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F  # noqa: N812

import wholebatch as wb
from coupled import ROWS, LooksAround, Towers, error_of, pairs, two_layers
from menagerie import Animal, regression
from properties import assert_leaves_no_trace, sgd, stepped

FP64 = 1e-12
pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def slope_of(what, by="x"):
    """A penalty on what some rows give, which begins after the first batch has been looked at."""

    def loss_fn(model, batch):
        x = batch["x"].clone().requires_grad_()
        h = model[0](x)
        everyone = wb.gather(h)
        said = model[1](torch.tanh(h - everyone.mean(0)))
        loss = F.mse_loss(said, batch["y"])
        if not batch["late"].any():
            return loss
        given = {"own": said, "gathered": wb.gather(said), "weighed": wb.gather(said)[wb.own_rows(said)]}[what]
        (slope,) = torch.autograd.grad(given.square().sum(), everyone if by == "all" else x, create_graph=True)
        return loss + slope.square().sum(1).mean()

    return loss_fn


def with_late(rows, dtype, late=True):
    return {**regression(rows, dtype), "late": torch.full((rows,), late)}


@pytest.mark.parametrize("lockstep", ["auto", "joined"])
@pytest.mark.parametrize(("what", "by"), [("own", "x"), ("own", "all"), ("weighed", "x")])
def test_a_gradient_inside_the_loss_of_one_micro_batch_is_refused_whenever_it_begins(what, by, lockstep):
    """What the others give is missing, whether own rows lead to it directly or by a meeting alone."""
    animal = Animal(two_layers, with_late, slope_of(what, by))
    model = animal.model()
    optimizer = sgd(model.parameters())
    accumulator = wb.Accumulator(model, optimizer, animal.loss_fn, micro_batch=wb.Rows(4), lockstep=lockstep)
    accumulator.step(with_late(ROWS, torch.float64, late=False))
    with (
        assert_leaves_no_trace(model, optimizer),
        pytest.raises(wb.MeetingError, match="A gradient is taken inside the loss") as error,
    ):
        accumulator.step(with_late(ROWS, torch.float64))
    assert "wb.gather(y).sum()" in error.value.hint


@pytest.mark.parametrize("lockstep", ["auto", "joined"])
def test_a_gradient_inside_the_loss_of_all_rows_is_exact_whenever_it_begins(lockstep):
    animal = Animal(two_layers, with_late, slope_of("gathered"))
    assert error_of(animal, stepped(animal, wb.Rows(4), lockstep=lockstep)) <= FP64


def test_a_penalty_through_exact_batch_norm_that_begins_late_is_refused():
    def penalised(model, batch):
        x = batch["x"].clone().requires_grad_()
        said = model(x)
        loss = F.mse_loss(said, batch["y"])
        if not batch["late"].any():
            return loss
        (slope,) = torch.autograd.grad(said.sum(), x, create_graph=True)
        return loss + slope.square().sum(1).mean()

    layers = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)
    model = wb.exact_batch_norm(nn.Sequential(*layers)).double()
    optimizer = sgd(model.parameters())
    accumulator = wb.Accumulator(model, optimizer, penalised, micro_batch=wb.Rows(4))
    accumulator.step(with_late(ROWS, torch.float64, late=False))
    with assert_leaves_no_trace(model, optimizer), pytest.raises(wb.MeetingError, match="exact batch norm"):
        accumulator.step(with_late(ROWS, torch.float64))


def test_a_replay_that_would_miss_a_gradient_inside_the_loss_says_so():
    """Nothing leads from what a micro-batch gets in the first pass to what it brought."""

    def penalised(model, batch):
        x = batch["x"].clone().requires_grad_()
        h = model[0](x)
        (slope,) = torch.autograd.grad((h - wb.gather(h).mean(0)).square().sum(), x, create_graph=True)
        return F.mse_loss(model(batch["x"]), batch["y"]) + slope.square().sum(1).mean()

    model = two_layers().double()
    options = {"micro_batch": wb.Rows(4), "lockstep": "replay", "check": None}
    accumulator = wb.Accumulator(model, sgd(model.parameters()), penalised, **options)
    with pytest.raises(wb.MeetingError, match=r"replay.*a gradient is taken inside the loss"):
        accumulator.step(regression(ROWS, torch.float64))


def assert_refused(loss_fn, lockstep, said, hint):
    model = LooksAround().double()
    optimizer = sgd(model.parameters())
    accumulator = wb.Accumulator(model, optimizer, loss_fn, micro_batch=wb.Rows(4), lockstep=lockstep, check=None)
    with assert_leaves_no_trace(model, optimizer), pytest.raises(wb.MeetingError, match=said) as error:
        accumulator.step(regression(ROWS, torch.float64))
    assert hint in error.value.hint


@pytest.mark.parametrize("lockstep", ["auto", "joined"])
def test_a_meeting_inside_of_torch_func_is_refused(lockstep):
    """What is brought there belongs to a transformation of one micro-batch alone."""

    def penalised(model, batch):
        slope = torch.func.grad(lambda x: model(x).sum())(batch["x"])
        return F.mse_loss(model(batch["x"]), batch["y"]) + slope.square().sum(1).mean()

    assert_refused(penalised, lockstep, r"inside of torch\.func", hint="torch.autograd.grad")


@pytest.mark.parametrize("lockstep", ["auto", "joined"])
def test_a_gradient_inside_the_loss_of_what_is_recomputed_is_refused(lockstep):
    """What is recomputed for it would wait for the others, and they for its end."""

    def penalised(model, batch):
        x = batch["x"].clone().requires_grad_()
        said = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        (slope,) = torch.autograd.grad(wb.gather(said).sum(), x, create_graph=True)
        return F.mse_loss(said, batch["y"]) + slope.square().sum(1).mean()

    assert_refused(penalised, lockstep, "what is recomputed for it would meet", hint="activation checkpointing")


def test_a_model_that_asks_for_gradients_of_its_own_is_joined():
    """A frozen first pass has none; what the user asks for is there in a graph through all."""

    def penalised(model, batch):
        left = model(batch["a"])
        (slope,) = torch.autograd.grad(left.square().sum(), model.encoder[0].weight, create_graph=True)
        return F.cross_entropy(left @ wb.gather(left).T, wb.own_rows(left)) + 0.0 * slope.sum()

    animal = Animal(Towers, pairs, penalised)
    assert error_of(animal, stepped(animal, wb.Rows(4))) <= FP64
    model = animal.model()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), penalised, micro_batch=wb.Rows(4), check=None)
    accumulator.step(pairs(ROWS, torch.float64))
    assert "asks for a graph of its own" in accumulator.reasons[0]


@pytest.mark.parametrize("normed", [False, True])
def test_a_gradient_penalty_of_what_all_rows_give_is_exact(normed):
    """What one micro-batch gives depends on its own rows alone as far as it can see; what is gathered, on all."""

    def penalised(model, batch):
        x = batch["x"].clone().requires_grad_()
        (slope,) = torch.autograd.grad(wb.gather(model(x)).sum(), x, create_graph=True)
        return F.mse_loss(model(x), batch["y"]) + slope.square().sum(1).mean()

    def build():
        norm = nn.BatchNorm1d(4) if normed else nn.LayerNorm(4)
        return wb.exact_batch_norm(nn.Sequential(nn.Linear(5, 4), norm, nn.Softplus(), nn.Linear(4, 3)))

    animal = Animal(build, regression, penalised)
    assert error_of(animal, stepped(animal, wb.Rows(4))) <= FP64
    assert wb.verify(animal.model(), penalised, regression(ROWS, torch.float64)).ok
