"""Micro-batches that meet make the update of the undivided batch: losses that compare rows, in both executions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F  # noqa: N812

import wholebatch as wb
from coupled import (
    CUTS,
    FEEDING,
    MEETING,
    ROWS,
    Towers,
    error_of,
    pairs,
    standardised,
    two_layers,
    two_sided,
    without_gather,
)
from menagerie import Animal, regression
from properties import assert_leaves_no_trace, change, gradient_of, relative_error, sgd, stepped, undivided, updated

FP64 = 1e-12
COUPLED = {**MEETING, **FEEDING}
pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("lockstep", ["auto", "replay", "joined"])
@pytest.mark.parametrize("name", MEETING)
def test_the_update_is_that_of_the_undivided_batch(name, lockstep, cut):
    assert error_of(MEETING[name], stepped(MEETING[name], CUTS[cut], lockstep=lockstep)) <= FP64


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("lockstep", ["auto", "joined"])
@pytest.mark.parametrize("name", FEEDING)
def test_the_update_is_that_of_the_undivided_batch_where_meetings_feed_each_other(name, lockstep, cut):
    assert error_of(FEEDING[name], stepped(FEEDING[name], CUTS[cut], lockstep=lockstep)) <= FP64


def test_the_bound_sees_negatives_from_the_micro_batch_alone():
    """Uncut, both losses are the same; cut, the one that does not gather is far off."""
    mistake = Animal(Towers, pairs, without_gather)
    right = MEETING["two-sided"]
    batch = pairs(ROWS, torch.float64)
    whole = change(right, undivided(right), [batch])
    assert relative_error(change(mistake, undivided(mistake), [batch]), whole) <= FP64
    assert relative_error(change(mistake, stepped(mistake, wb.Rows(4)), [batch]), whole) > 0.05


def test_the_bound_sees_a_balancing_loss_of_parts():
    def of_parts(model, batch):
        output, probabilities = model(batch["a"])
        share = F.one_hot(probabilities.argmax(1), 4).double().mean(0)
        return F.mse_loss(output, batch["b"]) + 0.3 * 4 * (share * probabilities.mean(0)).sum()

    right = MEETING["balanced experts"]
    mistake = Animal(right.build, pairs, of_parts)
    batch = pairs(ROWS, torch.float64)
    whole = change(right, undivided(right), [batch])
    assert relative_error(change(mistake, undivided(mistake), [batch]), whole) <= FP64
    assert relative_error(change(mistake, stepped(mistake, wb.Rows(3)), [batch]), whole) > 1e-3


@pytest.mark.parametrize("lockstep", ["replay", "joined"])
@pytest.mark.parametrize("name", MEETING)
def test_in_fp32_the_difference_is_rounding(name, lockstep):
    """64 eps: the undivided batch itself is some eps from that of float64."""
    error = error_of(MEETING[name], stepped(MEETING[name], wb.Rows(4), lockstep=lockstep), torch.float32)
    assert error <= 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("lockstep", ["replay", "joined"])
def test_under_autocast_and_in_bf16_weights_the_difference_is_rounding(lockstep):
    """In units of the eps of bfloat16; the missing gather is 20 times as far off."""
    eps = torch.finfo(torch.bfloat16).eps
    animal = MEETING["two-sided by hand"]
    batch = pairs(ROWS, torch.float32)
    exact = gradient_of(animal, undivided(animal), pairs(ROWS, torch.float64), dtype=torch.float64)
    cut = gradient_of(
        animal, stepped(animal, wb.Rows(4), lockstep=lockstep, precision="bf16"), batch, dtype=torch.float32
    )
    whole = gradient_of(animal, stepped(animal, wb.Rows(99), precision="bf16"), batch, dtype=torch.float32)
    assert relative_error(cut, exact) <= 1.5 * relative_error(whole, exact) + eps
    assert relative_error(cut, whole) <= 4 * eps
    half = {"dtype": torch.bfloat16}
    batch = pairs(ROWS, torch.bfloat16)
    cut = gradient_of(animal, stepped(animal, wb.Rows(4), lockstep=lockstep), batch, **half)
    whole = gradient_of(animal, undivided(animal), batch, **half)
    assert relative_error(cut, whole) <= 8 * eps


@pytest.mark.parametrize("accumulate_in", ["fp32", "compensated"])
@pytest.mark.parametrize("lockstep", ["replay", "joined"])
def test_sums_of_16_bit_weights_do_not_stagnate_over_256_micro_batches(lockstep, accumulate_in):
    """1 eps of bfloat16, against the undivided batch; weights summed by autograd in 16 bits are more than 2 off."""
    animal, eps = MEETING["two-sided"], torch.finfo(torch.bfloat16).eps
    batch = pairs(512, torch.bfloat16)
    right = gradient_of(animal, undivided(animal), batch, dtype=torch.bfloat16)
    way = {"lockstep": lockstep, "accumulate_in": accumulate_in}
    found = gradient_of(animal, stepped(animal, wb.Rows(2), **way), batch, dtype=torch.bfloat16)
    assert relative_error(found, right) <= eps
    if lockstep == "joined":
        naive = gradient_of(
            animal, stepped(animal, wb.Rows(2), lockstep=lockstep, accumulate_in="weights"), batch, dtype=torch.bfloat16
        )
        assert relative_error(naive, right) > 2 * eps


def test_weights_are_back_in_place_after_an_error():
    model = Towers().bfloat16()
    weights = dict(model.named_parameters())

    def loss_fn(model, batch):
        wb.gather(model(batch["a"]))
        raise RuntimeError("here")

    accumulator = wb.Accumulator(
        model, sgd(model.parameters()), loss_fn, micro_batch=wb.Rows(4), lockstep="joined", check=None
    )
    with pytest.raises(RuntimeError, match="here"):
        accumulator.step(pairs(ROWS, torch.bfloat16))
    assert all(each is weights[name] for name, each in model.named_parameters())


@pytest.mark.parametrize("name", COUPLED)
def test_updates_from_a_loader_meet_too(name):
    assert error_of(COUPLED[name], updated(COUPLED[name], (4, 1, 6))) <= FP64


def test_updates_know_from_then_on_and_a_tail_of_one_micro_batch_is_its_own_batch():
    animal = MEETING["two-sided"]
    model = animal.model()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), two_sided, check=None)
    parts = [pairs(rows, torch.float64) for rows in (3, 2, 4, 2, 5)]
    made = list(accumulator.updates(iter(parts), micro_batches=2))
    assert [update.micro_batches for update in made] == [2, 2, 1]
    assert [update.number for update in made] == [1, 2, 3]
    assert [update.rows for update in made] == [5, 6, 5]

    other = animal.model()
    steps = sgd(other.parameters())
    for group in (parts[:2], parts[2:4], parts[4:]):
        whole = {name: torch.cat([part[name] for part in group]) for name in group[0]}
        undivided(animal)(other, steps, whole)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert relative_error(one.detach(), two.detach()) <= FP64


@pytest.mark.parametrize("lockstep", ["replay", "joined"])
def test_clipping_counts_and_late_weights_hold(lockstep):
    """Targets that the loss itself counts, an uneven weight of micro-batches, and one clip of the whole gradient."""

    def counted(model, batch):
        left, everyone = model(batch["a"]), wb.gather(model(batch["b"]))
        kept = batch["label"] != 0
        each = F.cross_entropy(left @ everyone.T, wb.own_rows(left), reduction="none")
        return (each * kept).sum(), kept.sum()

    animal = Animal(Towers, pairs, counted)
    batch = pairs(ROWS, torch.float64)
    for options in ({}, {"clip_norm": 0.01}):
        right = change(animal, undivided(animal, **options), [batch])
        found = change(animal, stepped(animal, wb.Rows(2), lockstep=lockstep, **options), [batch])
        assert relative_error(found, right) <= FP64


@pytest.mark.parametrize("lockstep", ["replay", "joined"])
@pytest.mark.parametrize("none", [False, True], ids=["masked", "None"])
def test_a_micro_batch_without_targets_still_meets(lockstep, none):
    """Its rows are the negatives of others; its own loss is a mean over nothing, or None."""

    def masked(model, batch):
        left, everyone = model(batch["a"]), wb.gather(model(batch["b"]))
        kept = batch["kept"]
        if none and not kept.any():
            return None
        each = F.cross_entropy(left @ everyone.T, wb.own_rows(left), reduction="none")
        return each[kept].mean()

    def batches(rows, dtype):
        kept = torch.arange(rows) % 5 != 0
        kept[:4] = False
        return {**pairs(rows, dtype), "kept": kept}

    animal = Animal(Towers, batches, masked, targets=lambda batch: batch["kept"].sum())
    assert error_of(animal, stepped(animal, wb.Rows(4), lockstep=lockstep)) <= FP64
    assert error_of(animal, updated(animal, (4, 1, 6), lockstep=lockstep)) <= FP64


@pytest.mark.parametrize("scale", ["replay", "joined"])
def test_the_loss_scale_of_fp16_enters_what_was_met_as_well(scale):
    animal = MEETING["two-sided"]
    batch = pairs(ROWS, torch.float32)
    cut = gradient_of(animal, stepped(animal, wb.Rows(4), lockstep=scale, precision="fp16"), batch, dtype=torch.float32)
    whole = gradient_of(animal, undivided(animal), batch, dtype=torch.float32)
    assert relative_error(cut, whole) <= 8 * torch.finfo(torch.float16).eps


def test_the_choice_and_its_reason_are_kept():
    said = {}
    for name, animal in COUPLED.items():
        model = animal.model()
        accumulator = wb.Accumulator(model, sgd(model.parameters()), animal.loss_fn, micro_batch=wb.Rows(4), check=None)
        for number in (1, 2):
            assert accumulator.step(pairs(ROWS, torch.float64)).number == number
        (said[name],) = accumulator.reasons
    assert all('lockstep="auto" replays' in said[name] for name in MEETING)
    assert "coupled.py:" in said["two-sided"]
    assert "(wb.losses.info_nce)" in said["two-sided"]
    for name in FEEDING:
        assert 'lockstep="auto" joins the graphs' in said[name]
        assert "needs the gradient of what met before" in said[name]


def test_a_replay_that_is_not_possible_says_so_and_leaves_no_trace():
    model = FEEDING["standardised"].model()
    optimizer = sgd(model.parameters())
    accumulator = wb.Accumulator(model, optimizer, standardised, micro_batch=wb.Rows(4), lockstep="replay", check=None)
    with assert_leaves_no_trace(model, optimizer), pytest.raises(wb.MeetingError, match="replay") as error:
        accumulator.step(pairs(ROWS, torch.float64))
    assert 'lockstep="auto"' in error.value.hint


def test_a_model_that_never_meets_never_starts_a_thread(monkeypatch):
    monkeypatch.setattr("wholebatch.engine.meetings.baton._MicroBatch.go_on", None)
    model = nn.Linear(6, 2)
    accumulator = wb.Accumulator(
        model, sgd(model.parameters()), lambda model, batch: model(batch["a"]).mean(), micro_batch=wb.Rows(4)
    )
    assert accumulator.step(pairs(ROWS, torch.float32)).micro_batches == 3


def test_outside_and_uncut_they_are_the_identity():
    x = torch.randn(5, 2)
    assert wb.gather(x) is x
    assert wb.sum_over_batch(x) is x
    assert wb.sum_over_batch(5) == 5
    assert wb.own_rows(x).tolist() == [0, 1, 2, 3, 4]
    seen = []

    def loss_fn(model, batch):
        seen.append(wb.gather(batch["a"]) is batch["a"])
        return model(batch["a"]).mean()

    model = Towers()
    wb.Accumulator(model, sgd(model.parameters()), loss_fn, micro_batch=wb.Rows(99)).step(pairs(5, torch.float32))
    assert seen == [True]


@pytest.mark.parametrize("lockstep", ["replay", "joined"])
@pytest.mark.parametrize("cut", CUTS)
def test_rows_come_in_the_order_in_which_they_were_given(cut, lockstep):
    seen = []

    def loss_fn(model, batch):
        ids = wb.gather(batch["id"])
        seen.append(ids.tolist() == list(range(ROWS)))
        seen.append(torch.equal(ids[wb.own_rows(ids[: len(batch["id"])])], batch["id"]))
        everyone = wb.gather(model(batch["a"]))
        return (everyone[batch["id"]] - model(batch["b"])).square().mean()

    model = Towers()
    batch = {**pairs(ROWS, torch.float32), "id": torch.arange(ROWS)}
    wb.Accumulator(model, sgd(model.parameters()), loss_fn, micro_batch=CUTS[cut], lockstep=lockstep, check=None).step(
        batch
    )
    assert seen
    assert all(seen)


def test_numbers_and_masks_are_summed():
    seen = []

    def loss_fn(model, batch):
        seen.append(
            (
                wb.sum_over_batch(len(batch["a"])),
                wb.sum_over_batch(batch["label"] == 0).sum().item() if len(batch["a"]) == 2 else 0,
                wb.sum_over_batch(batch["length"].sum()).item(),
            )
        )
        return model(batch["a"]).mean()

    batch = pairs(8, torch.float32)
    model = Towers()
    wb.Accumulator(model, sgd(model.parameters()), loss_fn, micro_batch=wb.Rows(2), check=None).step(batch)
    assert set(seen) == {(8, int((batch["label"] == 0).sum()), int(batch["length"].sum()))}


@pytest.mark.slow
@pytest.mark.parametrize("lockstep", ["replay", "joined"])
def test_a_thousand_micro_batches_in_one_window(lockstep):
    animal = MEETING["two-sided"]
    batch = pairs(1000, torch.float64)
    whole = change(animal, undivided(animal), [batch])
    assert relative_error(change(animal, stepped(animal, wb.Rows(1), lockstep=lockstep), [batch]), whole) <= FP64


def pairs_of_six(rows, dtype):
    draw = torch.Generator().manual_seed(0)
    return {"a": torch.randn(rows, 6, generator=draw, dtype=torch.float64).to(dtype)}


def nothing_but_what_met(model, batch):
    everyone = wb.gather(model(batch["a"]))
    return torch.logsumexp((everyone @ everyone.T).flatten(), 0)


def penalised(model, batch):
    """Differentiates by what met, as a gradient penalty does."""
    mine = model(batch["a"])
    everyone = wb.gather(mine)
    loss = torch.logsumexp(mine @ everyone.T, 1).mean()
    (slope,) = torch.autograd.grad(torch.logsumexp((everyone @ everyone.T).flatten(), 0), everyone, create_graph=True)
    return loss + slope.square().sum()


def hooked(model, batch):
    everyone = wb.gather(model(batch["a"]))
    everyone.register_hook(lambda gradient: gradient * 1)
    return torch.logsumexp((everyone @ everyone.T).flatten(), 0)


@pytest.mark.parametrize("loss", [nothing_but_what_met, hooked])
def test_a_loss_of_nothing_but_what_met_is_replayed(loss):
    animal = Animal(lambda: nn.Linear(6, 4), pairs_of_six, loss)
    assert error_of(animal, stepped(animal, wb.Rows(4), lockstep="replay")) <= FP64


@pytest.mark.parametrize("drops", [0.0, 0.5])
def test_code_that_differentiates_by_what_met_makes_the_update_of_joined_graphs(drops):
    """It is run once more with the same draws."""
    animal = Animal(lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(drops), nn.Linear(8, 4)), pairs_of_six, penalised)
    batch = pairs_of_six(ROWS, torch.float64)
    replayed, joined = (
        change(animal, stepped(animal, wb.Rows(4), lockstep=each), [batch]) for each in ("replay", "joined")
    )
    assert relative_error(replayed, joined) <= FP64
    if not drops:
        assert error_of(animal, stepped(animal, wb.Rows(4), lockstep="replay")) <= FP64


def gathered_as_numbers(model, batch):
    """What needs no gradient may leave PyTorch, as where rows are clustered or matched outside of it."""
    x = model(batch["x"])
    everyone = wb.gather(x.detach()).numpy()
    above = torch.from_numpy(everyone[:, 0] > everyone[:, 0].mean())[wb.own_rows(x)]
    scale = float(wb.sum_over_batch(x.detach().square().sum()))
    return F.binary_cross_entropy_with_logits(x[:, 0], above.double()) * scale


def summed_without_gradient(model, batch):
    """Statistics of statistics, as a target that does not learn."""
    x = model(batch["x"])
    rows = wb.sum_over_batch(len(x))
    centred = x - wb.sum_over_batch(x.detach().sum(0)) / rows
    variance = wb.sum_over_batch(centred.detach().square().sum(0)) / rows
    return (centred / variance.sqrt()).tanh().square().mean()


def learning_in_some(model, batch, learns=lambda y: y[:, 0] > 0):
    """A part that only some rows have, so that some micro-batches bring nothing that learns."""
    x, some = model(batch["x"]), learns(batch["y"])
    brought = x[some].square().sum(0) if bool(some.any()) else torch.zeros(x.shape[1], dtype=x.dtype)
    return (x * wb.sum_over_batch(brought)).tanh().mean()


@pytest.mark.parametrize("loss", [gathered_as_numbers, summed_without_gradient])
@pytest.mark.parametrize("lockstep", ["auto", "replay", "joined"])
def test_what_meets_without_a_gradient_comes_back_without_one(lockstep, loss):
    animal = Animal(two_layers, regression, loss)
    assert error_of(animal, stepped(animal, wb.Rows(4), lockstep=lockstep)) <= FP64


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_replay_where_only_some_micro_batches_bring_something_that_learns(rows, last):
    """The last one, whose weights learn in the first pass, does not speak for those that differ from it."""

    def with_signs(count, dtype):
        batch = regression(count, dtype)
        batch["y"][:, 0] = batch["y"][:, 0].abs()
        batch["y"][-5:, 0] *= -1
        if last:
            batch["y"][:, 0] *= -1
        return batch

    animal = Animal(two_layers, with_signs, learning_in_some)
    assert error_of(animal, stepped(animal, wb.Rows(rows), lockstep="replay")) <= FP64
    model = animal.model()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), learning_in_some, micro_batch=wb.Rows(rows))
    for _ in range(2):
        accumulator.step(with_signs(ROWS, torch.float64))
    assert any('lockstep="auto" replays' in reason for reason in accumulator.reasons)


def test_what_met_that_meets_again_as_it_is_needs_its_gradient():
    def summed_twice(model, batch):
        x = model(batch["x"])
        return (x * wb.sum_over_batch(wb.sum_over_batch(x.sum(0)))).tanh().mean()

    found = []
    for lockstep in (
        "auto",
        "joined",
    ):  # the sum of sums counts the micro-batches, so that only these two can be compared
        animal = Animal(two_layers, regression, summed_twice)
        found.append(change(animal, stepped(animal, wb.Rows(4), lockstep=lockstep), [regression(ROWS, torch.float64)]))
    assert relative_error(*found) <= FP64


def test_a_second_tower_that_nobody_trains_is_no_reason_to_join():
    """Its weights require gradients, since nobody has said that they do not learn."""
    tower = nn.Linear(3, 3).double()

    def two_towers(model, batch):
        left, right = model(batch["x"]), tower(batch["y"])
        mine = wb.own_rows(left)
        return F.cross_entropy(left @ wb.gather(right).T, mine) + F.cross_entropy(right @ wb.gather(left).T, mine)

    animal = Animal(two_layers, regression, two_towers)
    assert error_of(animal, stepped(animal, wb.Rows(4), lockstep="replay")) <= FP64


HELPERS = """
import os, threading, torch
from torch import nn
import wholebatch as wb

torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 128))
found = []

def helpers():
    return len(os.listdir("/proc/self/task")) - threading.active_count()

def loss_fn(model, batch):
    loss = wb.losses.info_nce(model(batch[0]), model(batch[1]), symmetric=True)
    found.append(helpers())
    return loss

optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
accumulator = wb.Accumulator(model, optimizer, loss_fn, micro_batch=wb.Rows(32), lockstep="replay", check=None)
before = helpers()
accumulator.step((torch.randn(128, 512), torch.randn(128, 512)))
print(max(found) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads of the system are counted in /proc")
def test_a_micro_batch_computes_with_as_many_threads_as_its_caller():
    """Asked for one, the micro-batches bring no helpers of OpenMP: at 4 threads a process, 4 of them would bring 12."""
    done = subprocess.run(
        [sys.executable, "-c", HELPERS],
        env={**os.environ, "OMP_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert int(done.stdout) <= 2, done.stdout
