"""Where a framework that keeps its own loop takes hold: one micro-batch after the other, before the step, the scale."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import mse_loss

import wholebatch as wb
from menagerie import mean_square, mlp, regression
from properties import flat, relative_error, sgd
from wholebatch.engine.rehearsal import is_rehearsal, rehearsal


def parts(rows=(3, 1, 4)):
    batch = regression(sum(rows), torch.float64)
    ends = [sum(rows[:place]) for place in range(len(rows) + 1)]
    return batch, [{name: tensor[start:end] for name, tensor in batch.items()} for start, end in pairwise(ends)]


def weights(model):
    return flat(model.parameters())


def trained(act, loss_fn=mean_square, **options):
    torch.manual_seed(0)
    model = mlp().double()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), loss_fn, **options)
    act(accumulator)
    return model


def test_added_one_by_one_micro_batches_make_the_update_of_all():
    batch, micro_batches = parts()

    def one_by_one(accumulator):
        for place, each in enumerate([micro_batches[0], None, *micro_batches[1:]]):
            window = accumulator.add(each, last=place == 3)
            assert window is accumulator.open_window
        update = window.close()
        assert (update.rows, update.micro_batches) == (8, 3)

    right = trained(lambda accumulator: accumulator.step(batch), micro_batch=wb.Rows(8))
    assert relative_error(weights(trained(one_by_one)), weights(right)) <= 1e-14
    wrong = trained(lambda accumulator: accumulator.add(micro_batches[0]).close())
    assert relative_error(weights(wrong), weights(right)) > 1e-3


def test_nothing_but_none_is_no_update():
    def nothing(accumulator):
        assert "nothing to learn" in accumulator.add(None).close().skipped

    trained(nothing)


def test_an_added_micro_batch_that_does_not_fit_is_split():
    batch, micro_batches = parts()
    sizes = []

    def tight(model, micro_batch):
        sizes.append(len(micro_batch["x"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return mean_square(model, micro_batch)

    def act(accumulator):
        for each in micro_batches:
            window = accumulator.add(each)
        window.close()

    model = trained(act, tight, check=None)
    right = trained(lambda accumulator: accumulator.step(batch), micro_batch=wb.Rows(8))
    assert max(sizes) > 2
    assert relative_error(weights(model), weights(right)) <= 1e-14


def test_what_raises_leaves_the_window_open_for_another_try():
    _, (first, second, _) = parts()

    def act(accumulator):
        accumulator.add(first)
        with pytest.raises(KeyError):
            accumulator.add({"x": second["x"]})
        assert accumulator.add(second).close().rows == 4

    trained(act, check=None)


def test_a_hook_sees_the_gradient_of_the_update_and_may_change_it():
    batch, _ = parts()
    seen = []

    def look(accumulator):
        accumulator.step(batch)

    torch.manual_seed(0)
    model = mlp().double()

    def halve():
        seen.append(math.hypot(*(float(each.grad.norm()) for each in model.parameters())))
        for each in model.parameters():
            each.grad.mul_(0.5)

    start = weights(model)
    accumulator = wb.Accumulator(
        model, sgd(model.parameters()), mean_square, micro_batch=wb.Rows(3), clip_norm=0.1, before_step=halve
    )
    update = accumulator.step(batch)
    assert update.grad_norm > 0.1
    assert seen == pytest.approx([0.1], rel=1e-4)
    plain = trained(look, micro_batch=wb.Rows(3), clip_norm=0.1)
    assert relative_error(weights(model) - start, 0.5 * (weights(plain) - start)) <= 1e-12
    assert accumulator.step({"x": batch["x"] * math.inf, "y": batch["y"]}).skipped is not None
    assert len(seen) == 1  # there is no step to look at


def test_a_hook_that_raises_leaves_everything_as_it_was():
    batch, _ = parts()

    def refuse():
        raise KeyError("not now")

    torch.manual_seed(0)
    model = mlp().double()
    accumulator = wb.Accumulator(
        model, sgd(model.parameters()), mean_square, micro_batch=wb.Rows(3), before_step=refuse
    )
    start = weights(model)
    with pytest.raises(KeyError, match="not now"):
        accumulator.step(batch)
    assert torch.equal(weights(model), start)
    assert accumulator.open_window is None


def test_a_loss_scale_of_somebody_else_is_lowered_once_and_changes_no_gradient():
    batch, _ = parts()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def act(accumulator):
        assert accumulator.step(batch).skipped is None
        assert scaler.get_scale() == 256.0
        assert accumulator.step({"x": batch["x"] * math.inf, "y": batch["y"]}).skipped is not None
        assert scaler.get_scale() == 128.0

    model = trained(act, micro_batch=wb.Rows(3), loss_scaler=scaler)
    plain = trained(lambda accumulator: accumulator.step(batch), micro_batch=wb.Rows(3))
    assert relative_error(weights(model), weights(plain)) <= 1e-14


def test_a_scale_is_what_it_was_when_a_step_fails():
    batch, _ = parts()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1)

    class Failing(torch.optim.SGD):
        fails = True

        def step(self, closure=None):
            if self.fails:
                raise KeyError("no step")
            return super().step(closure)

    model = mlp().double()
    optimizer = Failing(model.parameters(), lr=0.1)
    accumulator = wb.Accumulator(model, optimizer, mean_square, loss_scaler=scaler)
    with pytest.raises(KeyError):
        accumulator.step(batch)
    assert scaler.get_scale() == 256.0
    optimizer.fails = False
    assert accumulator.step(batch).skipped is None
    assert scaler.get_scale() == 512.0


def test_a_scaler_that_is_off_or_none_scales_nothing():
    batch, _ = parts()
    trained(lambda accumulator: accumulator.step(batch), loss_scaler=torch.amp.GradScaler("cpu", enabled=False))
    with pytest.raises(wb.ConfigError, match="loss_scaler is a float"):
        trained(print, loss_scaler=2.0)


@pytest.mark.parametrize("micro_batch", [wb.Rows(2), "auto"], ids=["the first check", "a plan"])
def test_a_loss_can_tell_whether_it_is_only_looked_at(micro_batch):
    seen = {True: 0, False: 0}

    def loss_fn(model, batch):
        seen[is_rehearsal()] += len(batch["x"])
        return mse_loss(model(batch["x"]), batch["y"])

    model = mlp().double()
    batch, _ = parts()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), loss_fn, micro_batch=micro_batch)
    accumulator.step(batch)
    assert seen[False] == 8
    assert seen[True] > 0
    with rehearsal(), rehearsal():
        assert is_rehearsal()
    assert not is_rehearsal()
