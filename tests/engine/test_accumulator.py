"""The loop: records, schedules, reasons, what a batch may be, and what is refused before anything changes."""

import copy
import logging
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import lr_scheduler

import wholebatch as wb
from menagerie import CALM, mean_square, mlp, numbers, regression
from properties import assert_leaves_no_trace, flat, relative_error, sgd


def trained(loss_fn=mean_square, **options):
    torch.manual_seed(0)
    model = mlp().double()
    options = {"micro_batch": wb.Rows(2), "check": None, **options}
    return wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, **options), model


# The record.


@pytest.mark.parametrize("way", ["step", "updates", "window"])
def test_a_record_says_what_happened(way):
    accumulator, model = trained()
    batch = regression(5, torch.float64)
    loss = mean_square(model, batch)
    norm = flat(torch.autograd.grad(loss, list(model.parameters()))).norm()
    parts = [{name: x[rows] for name, x in batch.items()} for rows in (slice(0, 2), slice(2, 4), slice(4, 5))]
    if way == "step":
        update = accumulator.step(batch)
    elif way == "updates":
        (update,) = accumulator.updates(parts, micro_batches=3)
    else:
        with accumulator.window() as window:
            for part in parts:
                window.backward(mean_square(model, part), targets=len(part["x"]), rows=len(part["x"]))
        update = window.update
    assert update.loss == pytest.approx(loss.item(), rel=1e-12)
    assert update.grad_norm == pytest.approx(float(norm), rel=1e-12)
    assert (update.number, update.targets, update.rows, update.micro_batches) == (1, 5, 5, 3)
    assert (update.lr, update.skipped, update.retries, update.padding) == (0.1, None, 0, None)
    assert update.applied
    assert 0 < update.seconds < 60
    assert update.peak_bytes is None or update.peak_bytes > 1 << 20


def test_the_norm_of_the_record_is_that_before_clipping():
    batch = regression(5, torch.float64)
    norms = [trained(clip_norm=clip_norm)[0].step(batch).grad_norm for clip_norm in (None, 1e-3)]
    assert norms[0] == norms[1]


def test_a_record_of_rows_by_length_says_how_much_was_padded():
    rows = [torch.ones(length, 5, dtype=torch.float64) for length in (1, 4, 2, 8)]

    def pad(some):
        return nn.utils.rnn.pad_sequence(some, batch_first=True)

    accumulator, _ = trained(
        lambda model, x: (model(x).square().sum(), x.shape[0]), micro_batch=wb.Tokens(12, length=len), collate=pad
    )
    update = accumulator.step(rows)
    assert update.micro_batches == 2
    assert update.padding == pytest.approx(1 - 15 / (8 + 3 * 4))
    assert update.rows == 4


def test_records_are_numbered_and_say_the_rate_that_was_used():
    accumulator, model = trained()
    schedule = lr_scheduler.StepLR(accumulator._setup.optimizers[0], 1, 0.5)
    accumulator = wb.Accumulator(model, schedule.optimizer, mean_square, lr_scheduler=schedule)
    updates = [accumulator.step(batch) for batch in (regression(4, torch.float64), None, regression(4, torch.float64))]
    assert [update.number for update in updates] == [1, 2, 3]
    assert [update.lr for update in updates] == [0.1, 0.05, 0.05]
    assert [update.applied for update in updates] == [True, False, True]


# Schedules.


def test_a_schedule_is_stepped_once_an_applied_update():
    torch.manual_seed(0)
    model = mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedules = [lr_scheduler.LambdaLR(optimizer, lambda k: 0.5**k), lr_scheduler.ExponentialLR(optimizer, 1.0)]
    accumulator = wb.Accumulator(
        model, optimizer, mean_square, lr_scheduler=schedules, micro_batch=wb.Rows(1), check=None
    )
    bad = regression(4, torch.float64)
    bad["y"][0] = math.nan
    for batch in (regression(4, torch.float64), bad, None, regression(4, torch.float64)):
        accumulator.step(batch)
    assert [schedule.last_epoch for schedule in schedules] == [2, 2]


def test_a_plateau_looks_at_the_loss_of_the_logical_batch():
    torch.manual_seed(0)
    model = mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5, eps=0.0)
    accumulator = wb.Accumulator(
        model, optimizer, mean_square, lr_scheduler=schedule, micro_batch=wb.Rows(2), check=None
    )
    updates = [accumulator.step(regression(4, torch.float64)) for _ in range(4)]
    assert schedule.best == pytest.approx(updates[0].loss, rel=1e-4)
    assert updates[-1].lr < updates[0].lr


# Batches and loaders.


def test_a_batch_may_be_a_list_of_rows_that_is_collated_when_its_turn_comes():
    batch = regression(7, torch.float64)
    rows = [{name: x[k] for name, x in batch.items()} for k in range(7)]
    collated = []

    def collate(some):
        collated.append(len(some))
        return torch.utils.data.default_collate(some)

    changes = []
    for options in ({}, {"collate": collate}, {"collate": collate, "targets": lambda part: len(part["x"])}):
        accumulator, model = trained(micro_batch=wb.Rows(3), **options)
        before = flat(model.parameters())
        accumulator.step(rows if options else batch)
        changes.append(flat(model.parameters()) - before)
    assert all(relative_error(change, changes[0]) <= 1e-12 for change in changes)
    assert collated == [3, 3, 1] * 2


def test_rows_by_length_run_the_largest_micro_batch_first():
    seen = []

    def loss_fn(model, batch):
        seen.append(int(batch["length"].max()))
        return mean_square(model, batch)

    accumulator, _ = trained(loss_fn, micro_batch=wb.Tokens(10, length=lambda row: int(row["length"])))
    batch = {**regression(6, torch.float64), "length": torch.tensor([2, 9, 4, 1, 5, 3])}
    accumulator.step(batch)
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == 9


def test_updates_take_micro_batches_of_tensors_with_rows_anywhere():
    """Rows are counted where they lie, so that a smaller tail weighs less."""
    animal = CALM["rows on another dimension"]
    batch = animal.batch(5, torch.float64)
    parts = [{"x": batch["x"][:, rows], "y": batch["y"][rows]} for rows in (slice(0, 4), slice(4, 5))]
    model = animal.model()
    right = flat(torch.autograd.grad(animal.loss_fn(model, batch), list(model.parameters())))
    accumulator = wb.Accumulator(model, sgd(model.parameters()), animal.loss_fn, dims={"x": 1})
    before = flat(model.parameters())
    (update,) = accumulator.updates(parts, micro_batches=2)
    assert relative_error(before - flat(model.parameters()), right) <= 1e-12
    assert update.rows == 5


def test_updates_of_micro_batches_whose_rows_nobody_knows_ask_for_targets():
    accumulator, model = trained(lambda model, batch: mse_loss(model(batch["x"]), batch["y"]))
    odd = [{**regression(3, torch.float64), "anchor": torch.ones(2)} for _ in range(2)]
    with assert_leaves_no_trace(model), pytest.raises(wb.WeightError, match="disagree on its rows") as error:
        list(accumulator.updates(odd, micro_batches=2))
    assert "targets=" in error.value.hint
    accumulator, _ = trained(targets=lambda part: len(part["x"]))
    (update,) = accumulator.updates(odd, micro_batches=2)
    assert (update.targets, update.rows) == (6, None)


def test_a_loss_that_counts_by_itself_needs_no_rows():
    """Boxes, a different number in each picture, as a loader for detection yields them."""

    def loss_fn(model, micro_batch):
        x, wanted = micro_batch
        losses = [(y - target["y"]).square().sum() for y, target in zip(model(x), wanted, strict=True)]
        return sum(losses), sum(target["y"].numel() for target in wanted)

    model = mlp().double()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), loss_fn)
    whole = numbers(6, 5), [{"y": numbers(boxes, 3, seed=boxes)} for boxes in (2, 1, 4, 1, 3, 1)]
    loss_sum, targets = loss_fn(model, whole)
    right = flat(torch.autograd.grad(loss_sum / targets, list(model.parameters())))
    before = flat(model.parameters())
    parts = [(whole[0][rows], whole[1][rows]) for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    (update,) = accumulator.updates(parts, micro_batches=3)
    assert relative_error(before - flat(model.parameters()), right) <= 1e-12
    assert (update.targets, update.rows) == (36, None)


def test_updates_of_no_micro_batches_are_refused():
    accumulator, _ = trained()
    with pytest.raises(wb.WindowError, match="window of 0 micro-batches"):
        list(accumulator.updates([regression(2, torch.float64)], micro_batches=0))
    assert list(accumulator.updates([], micro_batches=2)) == []
    with pytest.raises(wb.WindowError, match="window of 0 micro-batches"):
        accumulator.window(micro_batches=0)
    accumulator.window().rollback()  # none was left open


@pytest.mark.parametrize(
    ("loader", "micro_batches", "found"),
    [
        ([], None, "micro_batches=None is no whole number"),
        ([], "4", "micro_batches='4' is no whole number"),
        ([], 2.5, "micro_batches=2.5 is no whole number"),
        ([], True, "micro_batches=True is no whole number"),
        (None, 2, "A NoneType yields no micro-batches"),
    ],
    ids=["none", "a text", "a half", "a truth", "no loader"],
)
def test_updates_of_what_is_no_loader_are_refused(loader, micro_batches, found):
    accumulator, _ = trained()
    with pytest.raises(wb.WindowError, match=found) as error:
        list(accumulator.updates(loader, micro_batches=micro_batches))
    assert error.value.hint


def test_one_path_may_be_given_by_itself():
    accumulator, _ = trained(lambda model, batch: (model(batch["x"]) + batch["bias"]).square().mean(), whole="bias")
    batch = {"x": regression(6, torch.float64)["x"], "bias": torch.ones(3, dtype=torch.float64)}
    assert accumulator.step(batch).rows == 6


@pytest.mark.parametrize(("batch", "collate"), [({"x": torch.ones(0, 5)}, None), ([], list)], ids=["tensors", "rows"])
def test_an_empty_batch_is_refused(batch, collate):
    accumulator, model = trained(collate=collate)
    with assert_leaves_no_trace(model), pytest.raises(wb.SplitError, match="empty") as error:
        accumulator.step(batch)
    assert "loader" in error.value.hint


def test_an_accumulator_without_a_loss_function_has_windows_only():
    accumulator, model = trained(None)
    with assert_leaves_no_trace(model), pytest.raises(wb.LossError, match="no loss function") as error:
        accumulator.step(regression(4, torch.float64))
    assert "accumulator.window()" in error.value.hint
    assert accumulator.window().is_open


def test_several_modules_go_together():
    torch.manual_seed(0)
    modules = nn.ModuleDict({"model": mlp(), "loss": nn.Linear(3, 1)}).double()
    optimizers = [torch.optim.SGD(part.parameters(), lr=1.0) for part in modules.values()]
    accumulator = wb.Accumulator(
        modules, optimizers, lambda m, b: m["loss"](m["model"](b["x"])).square().mean(), micro_batch=wb.Rows(2)
    )
    before = flat(modules.parameters())
    right = flat(
        torch.autograd.grad(
            modules["loss"](modules["model"](regression(5, torch.float64)["x"])).square().mean(),
            list(modules.parameters()),
        )
    )
    accumulator.step({"x": regression(5, torch.float64)["x"]})
    assert relative_error(before - flat(modules.parameters()), right) <= 1e-12


# Reasons.


def test_the_choice_not_to_cut_is_said_once_with_its_reason(caplog):
    accumulator, _ = trained(micro_batch="auto", memory="8GiB")
    with caplog.at_level(logging.INFO, "wholebatch"):
        updates = [accumulator.step(regression(6, torch.float64)) for _ in range(2)]
    assert [update.micro_batches for update in updates] == [1, 1]
    (reason,) = accumulator.reasons
    assert "the whole batch of 6 rows takes at most " in reason
    assert "of the 8 GiB of the budget, so it is not cut" in reason
    assert [record.getMessage() for record in caplog.records] == [reason]


def test_a_cut_that_was_asked_for_needs_no_reason():
    accumulator, _ = trained()
    accumulator.step(regression(6, torch.float64))
    assert accumulator.reasons == []


# Choices that do not exist, and batch norm, are refused before anything changes.


@pytest.mark.parametrize(
    ("options", "found", "hint"),
    [
        ({"on_nonfinite": "ignore"}, "on_nonfinite='ignore'", "on_nonfinite='skip' or on_nonfinite='raise'"),
        ({"batch_norm": "exact"}, "batch_norm='exact'", "batch_norm='refuse'"),
        ({"lockstep": "layered"}, "lockstep='layered'", "lockstep='auto' or lockstep='replay'"),
        ({"check": "always"}, "check='always'", "check=None"),
        ({"micro_batch": 8}, "micro_batch=8", "wb.Rows(8)"),
        ({"micro_batch": "all"}, "micro_batch='all'", '"auto"'),
        ({"clip_norm": 0}, "clip_norm=0", "above 0"),
        ({"clip_norm": math.nan}, "clip_norm=nan", "above 0"),
        ({"clip_norm": "1"}, "clip_norm='1'", "above 0"),
        ({"clip_norm": True}, "clip_norm=True", "above 0"),
        ({"clip_norm": torch.ones(2)}, "clip_norm=", "above 0"),
        ({"before_step": 3}, "before_step is a int", "without arguments"),
        ({"whole": 3}, "whole=3 names no tensors", "whole="),
        ({"whole": [3]}, "whole=.3. names no tensors", "whole="),
        ({"collate": 3}, "collate is a int", "default_collate"),
        ({"dims": "x"}, "dims='x'", "dims=1"),
        ({"dims": {"x": "first"}}, "dims={'x': 'first'}", "dims=1"),
    ],
    ids=str,
)
def test_a_choice_that_does_not_exist_is_refused(options, found, hint):
    with pytest.raises(wb.ConfigError, match=found) as error:
        trained(**options)
    assert hint in error.value.hint
    assert isinstance(error.value, ValueError)


def test_rows_that_a_loader_has_not_collated_are_told_from_a_micro_batch():
    accumulator, _ = trained(collate=torch.utils.data.default_collate)
    rows = [(torch.ones(3), torch.ones(2)) for _ in range(4)]
    with pytest.raises(wb.WeightError, match="disagree on its rows") as error:
        list(accumulator.updates([rows], micro_batches=1))
    assert "the loader collate it" in error.value.hint


@pytest.mark.parametrize("rows", [[torch.ones(3), torch.ones(5)], [[1.0, 2.0], [3.0]]], ids=["tensors", "lists"])
def test_a_loss_that_joins_rows_and_counts_by_itself_may_be_handed_a_list_of_them(rows):
    """As a loader with ``collate_fn=list`` yields it; a loss that cannot use them is told."""

    def loss_fn(model, some):
        x = torch.cat([torch.as_tensor(row, dtype=torch.float64) for row in some])
        return model(x[:, None].expand(-1, 5)).square().sum(), len(x)

    accumulator, model = trained(loss_fn)
    right = flat(torch.autograd.grad(torch.div(*loss_fn(model, [*rows, *rows])), list(model.parameters())))
    before = flat(model.parameters())
    (update,) = accumulator.updates([rows, rows], micro_batches=2)
    assert update.targets == 2 * sum(map(len, rows))
    assert relative_error((before - flat(model.parameters())) / 0.1, right) <= 1e-12
    accumulator, model = trained(lambda model, some: mse_loss(model(some["x"]), some["y"]))
    with assert_leaves_no_trace(model), pytest.raises(wb.WeightError, match="disagree on its rows") as error:
        list(accumulator.updates([rows, rows], micro_batches=2))
    assert "the loader collate it" in error.value.hint


# What is counted, and scaled, beforehand.


def test_targets_of_a_list_of_rows_are_counted_before_the_first_pass_if_asked():
    events = []

    def collate(rows):
        events.append("collate")
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def loss_fn(model, batch):
        events.append("pass")
        return mean_square(model, batch)

    batch = regression(5, torch.float64)
    rows = [{name: x[row] for name, x in batch.items()} for row in range(5)]
    seen = {}
    for first in (True, False):
        accumulator, model = trained(loss_fn, collate=collate, targets=lambda batch: len(batch["x"]))
        accumulator.counts_first = first
        events.clear()
        accumulator.step(rows)
        seen[first] = list(events), flat(model.parameters())
    assert seen[True][0] == ["collate"] * 3 + ["pass"] * 3
    assert seen[False][0] == ["collate", "pass"] * 3
    assert relative_error(seen[True][1], seen[False][1]) < 1e-14


def test_the_loss_scale_can_be_read_and_set():
    accumulator, _ = trained(precision="fp16")
    accumulator.loss_scale = {**accumulator.loss_scale, "scale": 8.0}
    assert accumulator.loss_scale["scale"] == 8.0
    plain, _ = trained()
    assert plain.loss_scale is None
    with pytest.raises(wb.ConfigError, match="here is another precision"):
        plain.loss_scale = accumulator.loss_scale


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_of_an_accumulator_trains_nothing_and_says_so(copied):
    """Without the hooks on weights, sums in 16 bits would stagnate, and AdamA would see no gradient."""
    accumulator, _ = trained()
    window = accumulator.window()
    other = COPIES[copied](accumulator)
    for use in (
        lambda: other.step(regression(5, torch.float64)),
        lambda: list(other.updates([], micro_batches=1)),
        lambda: other.window(),
        lambda: other.reasons,
        lambda: COPIES[copied](window).close(),
    ):
        with pytest.raises(wb.ConfigError, match="is a copy of another") as error:
            use()
        assert "make a wb.Accumulator of the copies" in error.value.hint
    window.rollback()
    assert accumulator.step(regression(5, torch.float64)).applied
    with pytest.raises(AttributeError, match="has no attribute 'stepp'"):
        accumulator.stepp  # noqa: B018


def test_a_model_that_holds_its_accumulator_can_be_copied():
    """As for a moving average of its weights."""
    model = nn.Sequential(nn.Linear(5, 3))
    model.accumulator = wb.Accumulator(model, sgd(model.parameters()), mean_square)
    average = copy.deepcopy(model)
    assert torch.equal(average[0].weight, model[0].weight)
    assert average[0].weight is not model[0].weight
