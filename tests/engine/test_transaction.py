"""A window becomes one update or leaves no trace: weights, optimizer state, gradients, buffers, random streams."""

import copy
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from torch import nn

import wholebatch as wb
from menagerie import BATCH_NORM, CALM, DROPOUT, mean_square, numbers, regression
from properties import assert_leaves_no_trace, flat, state_of
from wholebatch.engine.transaction import Transaction
from wholebatch.engine.uninterrupted import uninterrupted

ROWS = 6


class Draws(nn.Module):
    """Draws from every stream, and keeps what it has seen in buffers of every kind."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.register_buffer("through_data", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("later", None)

    def forward(self, x):
        if not hasattr(self, "lazy"):
            self.register_buffer("lazy", torch.ones(8, dtype=x.dtype))
        self.later = torch.ones(8) if self.later is None else self.later + 1
        self.through_data.data.add_(1)
        self.replaced = self.replaced + 1
        x = nn.functional.dropout(self.norm(self.first(x)) * self.lazy, 0.3 + 0.1 * random.random())
        return self.last(x) * float(np.random.rand())


class StumbleError(ArithmeticError):
    pass


def raising(loss_fn, at):
    """The loss function raises when it is called for the `at`-th time."""
    calls = iter(range(1, 1000))

    def stumble(model, batch):
        loss = loss_fn(model, batch)
        if next(calls) == at:
            raise StumbleError
        return loss

    return stumble


def breaking_backward(loss_fn, at):
    """The backward pass raises after half the parameters have their gradient."""
    calls = iter(range(1, 1000))

    def stumble(model, batch):
        output = model.first(batch["x"])
        if next(calls) == at:
            output.register_hook(lambda _: (_ for _ in ()).throw(StumbleError))
        return loss_fn(lambda _: model.last(model.norm(output)), batch)

    return stumble


def trained(loss_fn, *, batches=2, **options):
    """A model with momentum and a schedule that has been trained before, so that there is a state to spoil."""
    torch.manual_seed(1)
    model = Draws().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    options = {"batch_norm": "per_micro_batch", "check": None, "micro_batch": wb.Rows(2), **options}
    warm = wb.Accumulator(model, optimizer, mean_square, lr_scheduler=schedule, **options)
    for _ in range(batches):
        warm.step(regression(ROWS, torch.float64))
    mean_square(model, regression(2, torch.float64)).backward()
    np.random.seed(1)
    accumulator = wb.Accumulator(model, optimizer, loss_fn, lr_scheduler=schedule, **options)
    return accumulator, model, (optimizer, schedule)


def run(way, accumulator, loss_fn, model):
    batch = regression(ROWS, torch.float64)
    parts = [{name: tensor[start : start + 2] for name, tensor in batch.items()} for start in range(0, ROWS, 2)]
    if way == "step":
        return accumulator.step(batch)
    if way == "updates":
        return list(accumulator.updates(parts, micro_batches=3))
    with accumulator.window() as window:
        for part in parts:
            window.backward(loss_fn(model, part), targets=2)
    return window.update


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("stumble", [raising, breaking_backward])
@pytest.mark.parametrize("way", ["step", "updates", "window"])
def test_an_exception_inside_a_window_leaves_no_trace_and_training_goes_on(way, stumble, at):
    loss_fn = stumble(mean_square, at)
    accumulator, model, steppers = trained(loss_fn)
    with assert_leaves_no_trace(model, *steppers), pytest.raises(StumbleError):
        run(way, accumulator, loss_fn, model)
    assert run(way, accumulator, loss_fn, model)


def test_a_look_at_the_state_sees_what_a_window_changes():
    """The properties above are claims about things that do move."""
    accumulator, model, steppers = trained(mean_square)
    before = state_of(model, *steppers)
    window = accumulator.window()
    window.backward(mean_square(model, regression(ROWS, torch.float64)), targets=ROWS)
    inside = state_of(model, *steppers)
    assert [name for name in before if before[name] != inside[name]] == [
        "buffers", "gradients", "torch", "python", "numpy",
    ]  # fmt: skip
    window.close()
    after = state_of(model, *steppers)
    assert {"weights", "steppers"} <= {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize("name", CALM)
def test_a_rollback_leaves_no_trace(name):
    animal = CALM[name]
    model = animal.model()
    optimizer = torch.optim.SGD(animal.trained(model), lr=1.0)
    accumulator = wb.Accumulator(model, optimizer, **{**animal.objective, "targets": None})
    batch = animal.batch(ROWS, torch.float64)
    loss = animal.loss_fn(model, batch)
    (loss[0] if isinstance(loss, tuple) else loss).backward()
    with assert_leaves_no_trace(model, optimizer):
        window = accumulator.window()
        for _ in range(2):
            loss = animal.loss_fn(model, batch)
            window.backward(loss, targets=None if isinstance(loss, tuple) else ROWS)
        window.rollback()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
def test_a_window_that_is_not_finite_leaves_no_trace(on_nonfinite, bad):
    accumulator, model, steppers = trained(mean_square, on_nonfinite=on_nonfinite)
    batch = regression(ROWS, torch.float64)
    batch["y"][3, 0] = bad
    with assert_leaves_no_trace(model, *steppers):
        if on_nonfinite == "raise":
            with pytest.raises(wb.NonFiniteError, match="3 micro-batches is not finite: the loss is"):
                accumulator.step(batch)
        else:
            update = accumulator.step(batch)
            assert update.skipped == f"the loss is {bad}"
            assert not update.applied


def test_a_finite_loss_with_an_infinite_gradient_is_not_finite():
    torch.manual_seed(0)
    model = nn.Linear(5, 1).double()
    accumulator = wb.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, x: m(x).clamp(min=0).mul(0).sqrt().mean()
    )
    before = flat(model.parameters())
    update = accumulator.step(numbers(4, 5))
    assert update.skipped is not None
    assert "norm of the gradient is nan" in update.skipped
    assert torch.equal(flat(model.parameters()), before)


@pytest.mark.parametrize("way", ["skipped", "rolled back", "raised"])
@pytest.mark.parametrize("animal", [DROPOUT, BATCH_NORM], ids=["dropout", "batch norm"])
def test_training_with_a_bad_batch_in_between_is_training_without_it(animal, way):
    """Bitwise, with dropout masks and running statistics."""

    def train(*, disturbed):
        model = animal.model(torch.float32)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        accumulator = wb.Accumulator(
            model, optimizer, animal.loss_fn, micro_batch=wb.Rows(4), batch_norm="per_micro_batch", check=None
        )
        torch.manual_seed(11)
        for k in range(4):
            batch = {"x": numbers(10, 5, dtype=torch.float32, seed=k), "y": numbers(10, 3, dtype=torch.float32)}
            if disturbed and k == 2:
                disturb(accumulator, model, batch)
            assert accumulator.step(batch).applied
        return state_of(model, optimizer)

    def disturb(accumulator, model, batch):
        bad = {"x": batch["x"] + 1, "y": batch["y"] * float("nan")}
        if way == "skipped":
            assert accumulator.step(bad).skipped
            return
        window = accumulator.window()
        window.backward(animal.loss_fn(model, bad), targets=10)
        if way == "rolled back":
            window.rollback()
        else:
            with pytest.raises(wb.LossError):
                window.backward(torch.tensor(1.0), targets=1)
            assert window.is_open
            window.rollback()

    assert train(disturbed=True) == train(disturbed=False)


def test_an_exception_in_the_loader_rolls_the_open_window_back():
    accumulator, model, steppers = trained(mean_square)

    def loader():
        yield regression(2, torch.float64)
        raise StumbleError

    with assert_leaves_no_trace(model, *steppers), pytest.raises(StumbleError):
        list(accumulator.updates(loader(), micro_batches=2))
    assert accumulator.step(regression(ROWS, torch.float64)).applied


def test_updates_that_nobody_asks_for_any_more_leave_no_open_window():
    accumulator, _, _ = trained(mean_square)
    parts = [regression(2, torch.float64) for _ in range(6)]
    for update in accumulator.updates(parts, micro_batches=2):
        assert update.applied
        break
    assert accumulator.step(regression(ROWS, torch.float64)).applied


def test_a_schedule_that_raises_comes_after_a_whole_update():
    """A one-cycle schedule is over after its last step; the update before it has happened all the same."""
    model = CALM["mlp"].model()
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=2, cycle_momentum=False)
    accumulator = wb.Accumulator(model, optimizer, mean_square, lr_scheduler=schedule)
    batch = regression(ROWS, torch.float64)
    while schedule.last_epoch < schedule.total_steps:
        accumulator.step(batch)
    before, lr = flat(model.parameters()), optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="total steps"):
        accumulator.step(batch)
    other.load_state_dict(model.state_dict())
    nn.utils.vector_to_parameters(before, other.parameters())
    mean_square(other, batch).backward()
    expected = before - lr * flat(p.grad for p in other.parameters())
    torch.testing.assert_close(flat(model.parameters()), expected, rtol=1e-12, atol=1e-15)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_buffers_are_put_back_also_after_many_windows_that_were_not_rolled_back():
    model = Draws().double()
    accumulator = wb.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.1), mean_square, batch_norm="per_micro_batch", check=None
    )
    for count in range(1, 4):
        accumulator.step(regression(ROWS, torch.float64))
        assert model.through_data.tolist() == [count, count]
    bad = regression(ROWS, torch.float64)
    bad["x"][0] = float("nan")
    for _ in range(2):
        accumulator.step(bad)
        assert model.through_data.tolist() == [3, 3]
        assert model.replaced.tolist() == [3, 3]
        assert bool(model.norm.running_mean.isfinite().all())
    assert accumulator.step(regression(ROWS, torch.float64)).applied


def test_a_buffer_that_comes_in_a_rolled_back_window_goes_with_it():
    model = Draws().double()
    kept = Transaction(model, torch.device("cpu"))
    kept.begin()
    model(numbers(4, 5))
    assert model.lazy is not None
    kept.roll_back()
    assert not hasattr(model, "lazy")
    assert model.later is None
    model(numbers(4, 5))
    assert model.later.tolist() == [1] * 8


def test_a_buffer_that_was_set_in_inference_mode_is_put_back_too():
    """Tables that a validation pass has cached cannot be copied into."""
    model = Draws().double()
    with torch.inference_mode():
        model.register_buffer("table", torch.ones(3))
    kept = Transaction(model, torch.device("cpu"))
    kept.begin()
    model.table = torch.zeros(3)
    kept.roll_back()
    assert model.table.tolist() == [1, 1, 1]


class Grows(nn.Module):
    """Makes a layer in its first forward pass."""

    def forward(self, x):
        if not hasattr(self, "norm"):
            self.norm = nn.BatchNorm1d(x.shape[1], affine=False).to(x.dtype)
        return self.norm(x)


def test_a_module_that_comes_in_a_rolled_back_window_stays_whole():
    model = nn.Sequential(Grows())
    kept = Transaction(model, torch.device("cpu"))
    kept.begin()
    model(numbers(4, 5))
    kept.roll_back()
    assert model(numbers(4, 5)).shape == (4, 5)


def test_a_transaction_may_be_rolled_back_twice():
    model = Draws().double()
    kept = Transaction(model, torch.device("cpu"))
    kept.begin()
    draws = []
    for _ in range(2):
        kept.roll_back()
        draws.append((torch.rand(2).tolist(), random.random(), np.random.rand()))
    assert draws[0] == draws[1]


def test_a_transaction_that_never_began_has_nothing_to_put_back():
    model = Draws()
    with assert_leaves_no_trace(model):
        Transaction(model, torch.device("cpu")).roll_back()


class InterruptedHalfway(torch.optim.SGD):
    """Ctrl-C comes when half the parameters have moved."""

    def step(self, closure=None):
        groups, self.param_groups = (
            self.param_groups,
            [{**self.param_groups[0], "params": self.param_groups[0]["params"][:2]}],
        )
        super().step()
        os.kill(os.getpid(), signal.SIGINT)
        self.param_groups = [{**groups[0], "params": groups[0]["params"][2:]}]
        super().step()
        self.param_groups = groups


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals go to the main thread")
def test_an_interrupt_during_the_update_waits_for_its_end():
    animal = CALM["mlp"]
    model, other = animal.model(), animal.model()
    batch = animal.batch(ROWS, torch.float64)
    schedules = []
    for each, kind in ((model, InterruptedHalfway), (other, torch.optim.SGD)):
        optimizer = kind(each.parameters(), lr=0.1)
        schedules.append(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
        accumulator = wb.Accumulator(
            each, optimizer, animal.loss_fn, micro_batch=wb.Rows(2), lr_scheduler=schedules[-1]
        )
        if kind is InterruptedHalfway:
            with pytest.raises(KeyboardInterrupt):
                accumulator.step(batch)
        else:
            accumulator.step(batch)
    assert torch.equal(flat(model.parameters()), flat(other.parameters()))
    assert schedules[0].state_dict() == schedules[1].state_dict()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals go to the main thread")
def test_an_interrupt_in_a_forward_pass_leaves_no_trace():
    def interrupted(model, batch):
        loss = mean_square(model, batch)
        os.kill(os.getpid(), signal.SIGINT)
        return loss

    accumulator, model, steppers = trained(interrupted)
    with assert_leaves_no_trace(model, *steppers), pytest.raises(KeyboardInterrupt):
        accumulator.step(regression(ROWS, torch.float64))


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals go to the main thread")
@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL, signal.default_int_handler])
def test_the_handler_of_an_interrupt_is_the_one_of_before(before):
    found = signal.signal(signal.SIGINT, before)
    try:
        with uninterrupted():
            pass
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, found)


def test_other_threads_need_no_protection():
    entered = []

    def block():
        with uninterrupted():
            entered.append(True)

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert entered == [True]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("meets", [False, True])
def test_a_scripted_model_trains_as_any_other(meets):
    """What it keeps its buffers in can neither be gone through nor asked with `get`."""

    def loss_fn(model, x):
        y = model(x)
        return wb.losses.info_nce(y, x) if meets else y.square().mean()

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
    plain.register_buffer("scale", torch.ones(1, dtype=torch.float64))
    model = torch.jit.script(plain)
    right = copy.deepcopy(plain)
    x = torch.randn(8, 3, dtype=torch.float64)
    accumulator = wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, micro_batch=wb.Rows(3))
    accumulator.load_state_dict(accumulator.state_dict())
    assert accumulator.step(torch.full_like(x, torch.nan)).skipped
    assert accumulator.step(x).applied
    loss_fn(right, x).backward()
    torch.testing.assert_close(
        model.state_dict()["0.weight"], right[0].weight.detach() - 0.1 * right[0].weight.grad, rtol=1e-12, atol=1e-12
    )
