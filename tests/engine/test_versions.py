"""A micro-batch that has been written into is not run a second time as if it were the same."""

import pytest
import torch
from torch.nn.functional import mse_loss

import wholebatch as wb
from menagerie import mlp, regression
from properties import flat, relative_error, sgd


def copies(batch):
    return {name: x.clone() for name, x in batch.items()}


def parts(batch, rows):
    return [{name: x[start : start + rows] for name, x in batch.items()} for start in range(0, len(batch["x"]), rows)]


def in_one_buffer(batch, rows):
    """A loader that fills the same tensors again and again."""
    buffer = {name: torch.empty_like(x[:rows]) for name, x in batch.items()}
    for part in parts(batch, rows):
        for name, x in part.items():
            buffer[name].copy_(x)
        yield buffer


def centred(model, batch, gather=wb.gather):
    outputs = model(batch["x"])
    return (outputs - gather(outputs).mean(0) - batch["y"]).square().mean()


def made(loss_fn, optimizer=sgd, **options):
    torch.manual_seed(0)
    model = mlp().double()
    options = {"micro_batch": wb.Rows(4), "check": None, **options}
    return model, wb.Accumulator(model, optimizer(model.parameters()), loss_fn, **options)


def run(accumulator, batch, way):
    if way == "step":
        return accumulator.step(copies(batch))
    (update,) = accumulator.updates(map(copies, parts(batch, 4)), micro_batches=9)
    return update


def writing(model, batch, loss=centred):
    batch["x"].add_(0.5)
    return loss(model, batch)


@pytest.mark.parametrize("way", ["step", "updates"])
@pytest.mark.parametrize("check", ["first", None])
def test_a_loss_that_writes_into_what_meets_is_refused(way, check):
    batch = regression(12, torch.float64)
    model, accumulator = made(writing, check=check)
    before = flat(model.parameters())
    with pytest.raises((wb.LossError, wb.WindowError), match=r"writes into its micro-batch|has written into") as error:
        run(accumulator, batch, way)
    assert "new tensors" in error.value.hint
    assert torch.equal(flat(model.parameters()), before)
    assert accumulator.open_window is None


@pytest.mark.parametrize("way", ["step", "updates"])
def test_a_loss_that_has_written_is_not_tried_again_where_memory_runs_out(way):
    def short(model, batch):
        batch["x"].add_(0.5)
        if len(batch["x"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return mse_loss(model(batch["x"]), batch["y"])

    model, accumulator = made(short)
    before = flat(model.parameters())
    with pytest.raises(wb.LossError, match="writes into its micro-batch"):
        run(accumulator, regression(12, torch.float64), way)
    assert torch.equal(flat(model.parameters()), before)
    assert accumulator.open_window is None


@pytest.mark.parametrize("way", ["step", "updates"])
def test_a_loss_that_writes_where_nothing_runs_twice_is_exact(way):
    batch = regression(12, torch.float64)
    model, accumulator = made(lambda model, part: writing(model, part, lambda m, b: mse_loss(m(b["x"]), b["y"])))
    before = flat(model.parameters())
    right = flat(
        torch.autograd.grad(mse_loss(model(batch["x"] + 0.5), batch["y"]), list(model.parameters())),
    )
    assert run(accumulator, batch, way).applied
    assert relative_error(before - flat(model.parameters()), right) < 1e-12


@pytest.mark.parametrize("kind", ["meets", "AdamA"])
def test_a_loader_that_fills_the_same_tensors_again_is_refused_where_all_are_needed(kind):
    batch = regression(12, torch.float64)
    meets = kind == "meets"
    model, accumulator = made(centred, sgd) if meets else made(mean_square, wb.AdamA)
    before = flat(model.parameters())
    with pytest.raises(wb.WindowError, match="has written into a micro-batch") as error:
        list(accumulator.updates(in_one_buffer(batch, 4), micro_batches=3))
    assert "copies" in error.value.hint
    assert torch.equal(flat(model.parameters()), before)
    assert [update.applied for update in accumulator.updates(parts(batch, 4), micro_batches=3)] == [True]


def mean_square(model, batch):
    return mse_loss(model(batch["x"]), batch["y"])


def test_a_loader_may_fill_the_same_tensors_again_where_each_is_used_up():
    batch = regression(12, torch.float64)
    model, accumulator = made(mean_square)
    before = flat(model.parameters())
    right = flat(torch.autograd.grad(mean_square(model, batch), list(model.parameters())))
    (update,) = accumulator.updates(in_one_buffer(batch, 4), micro_batches=3)
    assert update.applied
    assert relative_error(before - flat(model.parameters()), right) < 1e-12


def test_verify_tells_a_loss_that_writes_from_one_that_the_cut_changes():
    batch = regression(12, torch.float64)
    with pytest.raises(wb.LossError, match="writes into its micro-batch"):
        wb.verify(mlp().double(), lambda model, part: writing(model, part, mean_square), copies(batch))

    def masks(model, part):
        part["y"][part["y"] < 0] = 0.0  # the same each time
        return mean_square(model, part)

    assert wb.verify(mlp().double(), masks, copies(batch)).ok
