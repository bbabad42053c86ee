"""What a micro-batch adds to the window: a loss, and the targets that it averages over."""

import math

import numpy as np
import pytest
import torch

import wholebatch as wb
from menagerie import mean_square, mlp, regression
from properties import assert_leaves_no_trace, flat, sgd
from wholebatch.engine.objective import Objective

LOSS = torch.ones((), requires_grad=True)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (lambda _: 3, 3),
        (lambda _: 2.5, 2.5),
        (lambda _: torch.tensor(3), 3),
        (lambda _: torch.tensor([3.5]), 3.5),
        (lambda _: np.int64(4), 4),
        (lambda _: np.float32(4.5), 4.5),
        (lambda _: True, 1),
        (lambda _: torch.tensor(True), 1),
        (None, 7),
    ],
)
def test_targets_are_counted_as_plain_numbers_where_that_asks_no_device(targets, count):
    counted = Objective(None, targets, "mean").count({}, 7)
    assert counted == count
    assert type(counted) in (int, float)


def test_targets_that_were_counted_on_a_device_stay_there():
    counted = Objective(None, lambda _: torch.empty((), device="meta"), "mean").count({}, 7)
    assert counted.device.type == "meta"


@pytest.mark.parametrize(
    ("result", "targets", "reduction", "part"),
    [
        (LOSS, 5, "mean", ("mean", 5, None, False)),
        (LOSS, 5, "sum", ("sum", 5, None, False)),
        ((LOSS, 3), 5, "mean", ("sum", 3, None, True)),
        ((LOSS, 3, LOSS), 5, "mean", ("sum", 3, LOSS, True)),
    ],
    ids=["mean", "sum", "pair", "pair with once"],
)
def test_a_result_says_what_it_is(result, targets, reduction, part):
    found = Objective(lambda *_: result, None, reduction)(None, {}, targets)
    assert (found.reduction, found.targets, found.once, found.counted) == part
    assert found.loss is LOSS


def test_a_result_of_none_says_that_there_is_nothing_to_learn():
    assert Objective(lambda *_: None, None, "mean")(None, {}, 5) is None


@pytest.mark.parametrize(
    ("options", "kind", "found", "hint"),
    [
        ({"loss_fn": 3}, wb.LossError, "loss_fn is a int", "loss_fn(model, micro_batch)"),
        ({"loss_fn": torch.nn.MSELoss()}, wb.LossError, "loss_fn is MSELoss, which compares outputs", "def loss_fn"),
        ({"loss_fn": torch.nn.functional.mse_loss}, wb.LossError, "loss_fn is mse_loss, which compares", "def loss_fn"),
        ({"loss_fn": lambda batch: batch}, wb.LossError, r"loss_fn takes \(batch\)", "the model first"),
        ({"loss_fn": lambda _m, _b, *, weight: weight}, wb.LossError, "loss_fn takes", "functools.partial"),
        ({"targets": 3}, wb.WeightError, "targets is a int", "labels"),
        ({"reduction": "none"}, wb.WeightError, "reduction='none'", 'reduction="sum"'),
    ],
)
def test_an_objective_that_cannot_be_is_refused(options, kind, found, hint):
    model = mlp()
    options = {"loss_fn": mean_square, **options}
    with pytest.raises(kind, match=found) as error:
        wb.Accumulator(model, sgd(model.parameters()), **options)
    assert hint in error.value.hint


class LossOfAModel(torch.nn.Module):
    def forward(self, model, batch, weight=1.0):
        return weight * mean_square(model, batch)


@pytest.mark.parametrize("loss_fn", [LossOfAModel(), LossOfAModel().forward, lambda *both: mean_square(*both), max])
def test_a_loss_function_of_any_kind_that_takes_both_is_taken(loss_fn):
    assert Objective(loss_fn, None, "mean").loss_fn is loss_fn


def sum_of_squares(model, batch):
    return (model(batch["x"]) - batch["y"]).square().sum()


BAD = {
    "not a tensor": ({"loss_fn": lambda m, b: mean_square(m, b).item()}, wb.LossError, "is a float, not a tensor"),
    "a model output": ({"loss_fn": lambda m, b: {"loss": mean_square(m, b)}}, wb.LossError, "is a dict, not a tensor"),
    "no scalar": ({"loss_fn": lambda m, b: m(b["x"])}, wb.LossError, r"no scalar: its shape is \(2, 3\)"),
    "no graph": ({"loss_fn": lambda m, b: mean_square(m, b).detach()}, wb.LossError, "no graph"),
    "a list": ({"loss_fn": lambda m, b: [mean_square(m, b), 2]}, wb.LossError, "is a list, not a tensor"),
    "swapped pair": ({"loss_fn": lambda m, b: (2, mean_square(m, b))}, wb.LossError, "is a int, not a tensor"),
    "counted twice": (
        {"loss_fn": lambda m, b: (sum_of_squares(m, b), 2), "targets": lambda _: 2},
        wb.WeightError,
        r"\(loss_sum, targets\), and targets=... was given as well",
    ),
    "negative": ({"targets": lambda _: -3}, wb.WeightError, "-3 targets"),
    "negative tensor": ({"targets": lambda _: torch.tensor(-3)}, wb.WeightError, "-3 targets"),
    "not a number": ({"targets": lambda _: math.nan}, wb.WeightError, "nan targets"),
    "several counts": ({"targets": lambda _: torch.ones(3)}, wb.WeightError, r"shape \(3,\)"),
    "no count": ({"targets": lambda _: None}, wb.WeightError, "type NoneType"),
    "negative pair": ({"loss_fn": lambda m, b: (sum_of_squares(m, b), -1)}, wb.WeightError, "-1 targets"),
    "negative tensor pair": (
        {"loss_fn": lambda m, b: (sum_of_squares(m, b), torch.tensor(-1))},
        wb.WeightError,
        "-1",
    ),
}


@pytest.mark.parametrize("way", ["step", "step with collate", "updates"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_loss_or_count_is_refused_and_nothing_is_lost(bad, way):
    options, kind, found = BAD[bad]
    torch.manual_seed(0)
    model = mlp().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sound = wb.Accumulator(model, optimizer, mean_square, micro_batch=wb.Rows(2), check=None)
    batch = regression(6, torch.float64)
    sound.step(batch)
    mean_square(model, batch).backward()
    options = {"loss_fn": mean_square, "micro_batch": wb.Rows(2), "check": None, **options}
    if way == "step with collate":
        options["collate"] = torch.utils.data.default_collate
    accumulator = wb.Accumulator(model, optimizer, **options)
    parts = [{name: x[k : k + 2] for name, x in batch.items()} for k in (0, 2, 4)]
    rows = [{name: x[k] for name, x in batch.items()} for k in range(6)]
    run = {
        "step": lambda: accumulator.step(batch),
        "step with collate": lambda: accumulator.step(rows),
        "updates": lambda: list(accumulator.updates(parts, micro_batches=3)),
    }[way]
    with assert_leaves_no_trace(model, optimizer), pytest.raises(kind, match=found) as error:
        run()
    assert error.value.hint
    before = flat(model.parameters())
    assert sound.step(batch).applied
    assert not torch.equal(flat(model.parameters()), before)
    assert accumulator.window().is_open
