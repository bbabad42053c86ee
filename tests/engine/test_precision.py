"""In which dtype forward passes run, and how a float16 loss keeps its range (T10)."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import wholebatch as wb
from menagerie import CALM, mean_square, mlp, numbers, regression
from properties import flat, relative_error, sgd
from wholebatch.engine.precision import Precision

CPU = torch.device("cpu")


class Sees(nn.Linear):
    """Remembers the dtype of its output."""

    dtype = None

    def forward(self, x):
        output = super().forward(x)
        self.dtype = output.dtype
        return output


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_forward_passes_run_in_the_precision_that_is_asked_for(precision, dtype):
    model = Sees(5, 3)
    accumulator = wb.Accumulator(
        model,
        sgd(model.parameters()),
        lambda m, b: mse_loss(m(b["x"]), b["y"]),
        precision=precision,
        micro_batch=wb.Rows(2),
    )
    accumulator.step(regression(4, torch.float32))
    assert model.dtype == dtype
    with accumulator.autocast():
        model(numbers(2, 5, dtype=torch.float32))
    assert model.dtype == dtype
    assert model.weight.dtype == torch.float32


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_learn_what_thirty_two_bits_learn(precision):
    """The scale and its division cancel, early and late; what is left is rounding of the forward pass."""
    animal = CALM["mlp"]
    batch = animal.batch(8, torch.float32)
    changes = []
    for each in ("fp32", precision):
        model = animal.model(torch.float32)
        before = flat(model.parameters())
        accumulator = wb.Accumulator(
            model, sgd(model.parameters()), animal.loss_fn, precision=each, micro_batch=wb.Rows(3), check=None
        )
        assert accumulator.step(batch).applied
        changes.append(flat(model.parameters()) - before)
    eps = torch.finfo(torch.bfloat16 if precision == "bf16" else torch.float16).eps
    assert relative_error(changes[1], changes[0]) <= 4 * eps


def overflowing(rows=6, at=2):
    """Rows of which number `at` makes a gradient that float16 cannot hold once it is scaled."""
    batch = regression(rows, torch.float32)
    batch["x"][at] = 3e4
    return batch


def clipped_loss(model, batch):
    return nn.functional.smooth_l1_loss(model(batch["x"]).float(), batch["y"])


def fp16_training(**options):
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    accumulator = wb.Accumulator(
        model,
        optimizer,
        clipped_loss,
        precision="fp16",
        micro_batch=wb.Rows(2),
        lr_scheduler=schedule,
        check=None,
        **options,
    )
    return accumulator, model, optimizer


@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
def test_inf_in_one_micro_batch_skips_the_whole_update_and_halves_the_scale_once(on_nonfinite):
    """T10: weights, momentum and schedule stay, also with "raise": the scale was too high, nobody did wrong."""
    accumulator, model, optimizer = fp16_training(on_nonfinite=on_nonfinite)
    assert accumulator.step(regression(6, torch.float32)).applied
    scale = accumulator._precision.scale()
    before = flat(model.parameters()), flat(state["momentum_buffer"] for state in optimizer.state.values())
    lr = optimizer.param_groups[0]["lr"]
    update = accumulator.step(overflowing())
    assert update.skipped in ("the norm of the gradient is inf", "the norm of the gradient is nan")
    assert accumulator._precision.scale() == scale / 2
    assert torch.equal(flat(model.parameters()), before[0])
    assert torch.equal(flat(state["momentum_buffer"] for state in optimizer.state.values()), before[1])
    assert optimizer.param_groups[0]["lr"] == lr
    assert accumulator.step(regression(6, torch.float32)).applied


def test_a_scale_that_was_too_high_is_lowered_until_it_fits():
    accumulator, _, _ = fp16_training()
    updates = [accumulator.step(overflowing()) for _ in range(12)]
    skipped = [update.skipped is not None for update in updates]
    assert skipped[0]
    assert not skipped[-1]
    assert skipped == sorted(skipped, reverse=True)


def test_an_infinite_loss_is_the_users_and_raises_also_in_float16():
    accumulator, _, _ = fp16_training(on_nonfinite="raise")
    batch = regression(6, torch.float32)
    batch["y"][0] = float("inf")
    with pytest.raises(wb.NonFiniteError, match="the loss is inf"):
        accumulator.step(batch)


class OverflowsOnBias(torch.autograd.Function):
    """Only the second optimizer's gradient is infinite."""

    @staticmethod
    def forward(ctx, x, bad):
        ctx.bad = bad
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (float("inf") if ctx.bad else 1.0), None


def test_two_optimizers_share_one_scale_one_norm_and_one_fate():
    """T10: the second one is not divided twice, and what spoils one skips both."""
    torch.manual_seed(0)
    model = mlp()
    other = mlp()
    other.load_state_dict(model.state_dict())
    two = [torch.optim.SGD(part.parameters(), lr=1.0) for part in (model[0], model[2])]
    spoilt = {"now": False}

    def loss_fn(model, batch):
        bias = OverflowsOnBias.apply(model[2].bias, spoilt["now"])
        hidden = torch.tanh(model[0](batch["x"]))
        return mse_loss((nn.functional.linear(hidden, model[2].weight) + bias).float(), batch["y"])

    accumulator = wb.Accumulator(
        model, two, loss_fn, precision="fp16", clip_norm=0.1, micro_batch=wb.Rows(3), check=None
    )
    batch = regression(6, torch.float32)
    spoilt["now"] = True
    before = flat(model.parameters())
    assert accumulator.step(batch).skipped
    assert torch.equal(flat(model.parameters()), before)
    spoilt["now"] = False
    assert accumulator.step(batch).applied
    mse_loss(other(batch["x"]), batch["y"]).backward()
    torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
    right = -flat(parameter.grad for parameter in other.parameters())
    assert relative_error(flat(model.parameters()) - before, right) <= 4 * torch.finfo(torch.float16).eps


def test_the_scale_is_raised_again_after_many_good_windows():
    precision = Precision("fp16", CPU)
    start = float(precision.scale())
    precision.settle(torch.tensor(float("inf")))
    assert float(precision.scale()) == start / 2
    for _ in range(2000):
        precision.settle(torch.tensor(1.0))
    assert float(precision.scale()) == start


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_float16_has_a_scale(precision):
    without = Precision(precision, CPU)
    without.settle(torch.tensor(float("inf")))
    assert without.scale() is None


def test_a_precision_that_does_not_exist_is_refused():
    model = mlp()
    with pytest.raises(wb.WeightError, match="precision='fp8'") as error:
        wb.Accumulator(model, sgd(model.parameters()), precision="fp8")
    assert '"bf16"' in error.value.hint


class Halves(nn.Module):
    """Two parts that two optimizers step, at different rates."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def change_of_halves(precision, scaled_down=1.0, batches=3):
    """The change of the weights after some updates, with two optimizers and one loss scale, clipped together."""
    torch.manual_seed(0)
    model = Halves()
    before = flat(model.parameters())
    rates = ((model.body, 0.5), (model.head, 0.25))
    optimizers = [torch.optim.SGD(part.parameters(), lr=lr / scaled_down) for part, lr in rates]
    accumulator = wb.Accumulator(
        model,
        optimizers,
        lambda m, b: mse_loss(m(b["x"]).float(), b["y"]),
        micro_batch=wb.Rows(2),
        precision=precision,
        clip_norm=0.05,
    )
    updates = [accumulator.step(regression(7, torch.float32)) for _ in range(batches)]
    assert all(update.applied and update.grad_norm > 0.05 for update in updates)
    return flat(model.parameters()) - before


def undivided_halves(batches=3):
    """The same from the plain loop, undivided and without autocast."""
    torch.manual_seed(0)
    model = Halves()
    before = flat(model.parameters())
    optimizers = [
        torch.optim.SGD(model.body.parameters(), lr=0.5),
        torch.optim.SGD(model.head.parameters(), lr=0.25),
    ]
    for _ in range(batches):
        batch = regression(7, torch.float32)
        model.zero_grad()
        mse_loss(model(batch["x"]), batch["y"]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        for optimizer in optimizers:
            optimizer.step()
    return flat(model.parameters()) - before


def test_two_optimizers_of_one_model_share_a_loss_scale_and_a_clip():
    """Divided by the scale once each, and clipped by the norm of both parts together (T10)."""
    right = undivided_halves()
    assert relative_error(change_of_halves("fp32"), right) <= 1e-5
    assert relative_error(change_of_halves("fp16"), right) <= 4 * torch.finfo(torch.float16).eps


def test_the_bound_sees_a_second_division_by_the_scale():
    right = undivided_halves()
    assert relative_error(change_of_halves("fp16", scaled_down=65536.0), right) > 0.9


def test_the_bound_sees_parts_that_are_clipped_apart():
    torch.manual_seed(0)
    model = Halves()
    before = flat(model.parameters())
    batch = regression(7, torch.float32)
    mse_loss(model(batch["x"]), batch["y"]).backward()
    for part, lr in ((model.body, 0.5), (model.head, 0.25)):
        nn.utils.clip_grad_norm_(part.parameters(), 0.05)
        torch.optim.SGD(part.parameters(), lr=lr).step()
    assert relative_error(flat(model.parameters()) - before, undivided_halves(1)) > 0.1


def test_a_window_that_overflows_moves_neither_of_two_optimizers_and_lowers_the_scale_once():
    torch.manual_seed(0)
    model = Halves()
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.5, momentum=0.9) for part in (model.body, model.head)]
    schedules = [torch.optim.lr_scheduler.StepLR(each, 1, 0.5) for each in optimizers]
    accumulator = wb.Accumulator(
        model,
        optimizers,
        lambda m, b: mse_loss(m(b["x"]).float(), b["y"]),
        micro_batch=wb.Rows(2),
        precision="fp16",
        clip_norm=0.05,
        lr_scheduler=schedules,
    )
    good, bad = regression(8, torch.float32), regression(8, torch.float32)
    bad["y"][3] = torch.inf  # in the second micro-batch only
    assert accumulator.step(good).applied
    before, scale = flat(model.parameters()), float(accumulator._precision.scale())
    assert accumulator.step(bad).skipped
    assert torch.equal(flat(model.parameters()), before)
    assert [each.get_last_lr() for each in schedules] == [[0.25], [0.25]]
    assert float(accumulator._precision.scale()) == scale / 2
    assert accumulator.step(good).applied


def test_an_autocast_around_the_whole_loop_goes_on_with_the_weights_of_each_update():
    batches = [regression(8, torch.float32) for _ in range(3)]
    found = []
    for around in (True, False):
        torch.manual_seed(0)
        model = mlp()
        accumulator = wb.Accumulator(model, sgd(model.parameters()), mean_square, micro_batch=wb.Rows(4), check=None)
        autocast = torch.autocast("cpu", torch.bfloat16)
        with autocast if around else nullcontext():
            for batch in batches:
                with nullcontext() if around else torch.autocast("cpu", torch.bfloat16):
                    accumulator.step(batch)
        found.append(flat(model.parameters()))
    assert torch.equal(*found)
