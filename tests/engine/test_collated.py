"""Rows that collate leaves out are not weighed as if they were there: they are counted, or the window is refused."""

import pytest
import torch
from torch.utils.data import default_collate

import wholebatch as wb
from menagerie import mlp, regression
from properties import flat, relative_error, sgd

FP64 = 1e-12


def mean_square(model, part):
    return torch.nn.functional.mse_loss(model(part["x"]), part["y"])


def met(model, part):
    """The same, of micro-batches that meet."""
    return mean_square(model, part) + 0 * wb.sum_over_batch(part["y"].sum()) * flat_of(model)


def flat_of(model):
    return next(model.parameters()).sum()


def rows_with_holes(holes):
    batch = regression(11, torch.float64)
    rows = [{"x": x, "y": y} for x, y in zip(batch["x"], batch["y"], strict=True)]
    for place in holes:
        rows.insert(place, None)
    return batch, rows


def leave_out(rows):
    """A collate function as one finds it: what could not be read is left out."""
    there = [row for row in rows if row is not None]
    return default_collate(there) if there else None


def made(loss_fn=mean_square, **options):
    torch.manual_seed(0)
    model = mlp().double()
    options = {"collate": leave_out, "micro_batch": wb.Rows(4), "check": None, **options}
    return model, wb.Accumulator(model, sgd(model.parameters()), loss_fn, **options)


def right_gradient(batch):
    torch.manual_seed(0)
    model = mlp().double()
    mean_square(model, batch).backward()
    return flat(weight.grad for weight in model.parameters())


@pytest.mark.parametrize("loss_fn", [mean_square, met])
@pytest.mark.parametrize("holes", [[1], [5], [11], [1, 9]], ids=str)
def test_rows_that_are_left_out_are_not_weighed_without_a_word(holes, loss_fn):
    _, rows = rows_with_holes(holes)
    model, accumulator = made(loss_fn)
    before = flat(model.parameters())
    with pytest.raises(wb.WeightError, match=r"Of \d rows of a micro-batch, \d came out of collate") as error:
        accumulator.step(rows)
    assert "targets=lambda" in error.value.hint
    assert torch.equal(flat(model.parameters()), before)
    assert accumulator.open_window is None


@pytest.mark.parametrize("holes", [[1], [5], [1, 9]], ids=str)
def test_they_may_be_counted_where_they_are(holes):
    batch, rows = rows_with_holes(holes)
    pair = lambda model, part: (mean_square(model, part) * len(part["x"]), len(part["x"]))  # noqa: E731
    for loss_fn, options in ((mean_square, {"targets": lambda part: len(part["x"])}), (pair, {})):
        model, accumulator = made(loss_fn, **options)
        before = flat(model.parameters())
        assert accumulator.step(rows).targets == 11
        assert relative_error(before - flat(model.parameters()), right_gradient(batch)) <= FP64


@pytest.mark.parametrize("targets", [None, lambda part: len(part["x"])], ids=["rows", "counted"])
def test_a_micro_batch_of_which_nothing_is_left_adds_nothing(targets):
    """T4: it is None, at the first, a middle and the last place."""
    batch, rows = rows_with_holes([0, 6, 13])
    model, accumulator = made(micro_batch=wb.Rows(1), targets=targets)
    before = flat(model.parameters())
    update = accumulator.step(rows)
    assert (update.targets, update.micro_batches) == (11, 11)
    assert relative_error(before - flat(model.parameters()), right_gradient(batch)) <= FP64


def test_rows_that_are_packed_or_lie_on_another_dimension_are_no_rows_left_out():
    batch, _ = rows_with_holes([])
    for collate, loss_fn in (
        (lambda rows: torch.stack(rows)[None], lambda model, part: model(part[0]).square().mean()),
        (lambda rows: torch.stack(rows, dim=1)[:3], lambda model, part: part[0].mean() * flat_of(model)),
    ):
        _, accumulator = made(loss_fn, collate=collate)
        assert accumulator.step(list(batch["x"])).applied


def test_a_single_micro_batch_is_what_it_is():
    batch, rows = rows_with_holes([5])
    model, accumulator = made(micro_batch=wb.Rows(12))
    before = flat(model.parameters())
    accumulator.step(rows)
    assert relative_error(before - flat(model.parameters()), right_gradient(batch)) <= FP64
