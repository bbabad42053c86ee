"""What goes wrong where micro-batches meet ends all of them and leaves no trace; what is random is replayed."""

import contextlib
import os
import random
import signal
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

import wholebatch as wb
from coupled import MEETING, Towers, length_of, pairs, two_sided
from menagerie import CONTRASTIVE, Animal, mlp, numbers, regression
from properties import (
    assert_leaves_no_trace,
    change,
    flat,
    gradient_of,
    relative_error,
    sgd,
    state_of,
    stepped,
    undivided,
)
from wholebatch.engine.fit.timeline import Timeline
from wholebatch.engine.meetings import joined
from wholebatch.engine.meetings.company import among, here, recomputing_with
from wholebatch.engine.meetings.singly import Alone

FP64 = 1e-12
ROWS = 11
BOTH = pytest.mark.parametrize("lockstep", ["replay", "joined"])
pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def contrast(left, right):
    return F.cross_entropy(left @ wb.gather(right).T, wb.own_rows(left))


def accumulator_of(loss_fn, model=None, **options):
    torch.manual_seed(0)
    model = Towers().double() if model is None else model
    options = {"micro_batch": wb.Rows(4), "check": None, **options}
    return wb.Accumulator(model, sgd(model.parameters()), loss_fn, **options), model


def first(batch):
    """Whether this is the micro-batch that holds row 0."""
    return torch.equal(batch["a"][0], numbers(ROWS, 6)[0])


def last(batch):
    return torch.equal(batch["a"][-1], numbers(ROWS, 6)[-1])


# Meetings that do not come about


def at_another_place(model, batch):
    x = model(batch["a"])
    if last(batch):
        return wb.sum_over_batch(x).square().mean()
    return wb.gather(x).square().mean()


def too_early(model, batch):
    x = model(batch["a"])
    return x.sum() if last(batch) else contrast(x, x)


def once_too_often(model, batch):
    x = model(batch["a"])
    loss = contrast(x, x)
    return loss + wb.gather(x).mean() if last(batch) else loss


def none_without_meeting(model, batch):
    return None if last(batch) else contrast(model(batch["a"]), model(batch["b"]))


@BOTH
@pytest.mark.parametrize(
    ("loss_fn", "found"),
    [
        (
            at_another_place,
            r"micro-batch 0 meets at .*:\d+ \(wb.gather\), and micro-batch 2 meets at .*:\d+ \(wb.sum_over",
        ),
        (too_early, r"micro-batch 0 meets at .*:\d+ \(wb.gather\), and micro-batch 2 ends without meeting anybody"),
        (once_too_often, r"micro-batch 0 ends after it met at .*:\d+ \(wb.gather\), and micro-batch 2 meets at .*:\d+"),
        (none_without_meeting, r"micro-batch 2 ends without meeting anybody"),
    ],
)
def test_micro_batches_that_do_not_meet_at_the_same_places_are_an_error_that_names_both(loss_fn, found, lockstep):
    accumulator, model = accumulator_of(loss_fn, lockstep=lockstep)
    with assert_leaves_no_trace(model), pytest.raises(wb.MeetingError, match=found) as error:
        accumulator.step(pairs(ROWS, torch.float64))
    assert "test_meeting.py" in str(error.value)
    assert "same meetings in the same order" in error.value.hint
    assert isinstance(error.value, RuntimeError)
    assert accumulator.open_window is None


@BOTH
@pytest.mark.parametrize(
    ("loss_fn", "found"),
    [
        (lambda model, batch: wb.gather(model(batch["a"]).sum()), "something of shape \\(\\), which has no rows"),
        (lambda *_: wb.gather(3), "something of type int"),
        (
            lambda model, batch: wb.gather(torch.cat([model(batch["a"])] * 2)).sum(),
            "8 entries in a micro-batch of 4 rows",
        ),
        (lambda model, batch: wb.own_rows(batch["a"][1:]).sum() + wb.gather(model(batch["a"])).sum(), "3 entries in a"),
        (lambda model, batch: wb.own_rows(len(batch["a"])).sum() + wb.gather(model(batch["a"])).sum(), "of type int"),
        (lambda _, batch: wb.gather(batch["a"][:, : len(batch["a"])]).sum(), "of shape .4, 4. in micro-batch 0"),
        (lambda model, batch: wb.sum_over_batch(model(batch["a"])).sum(), "of shape .4, 8. in micro-batch 0"),
        (lambda *_: wb.sum_over_batch("many"), "was given a str"),
    ],
)
def test_what_does_not_fit_together_is_named(loss_fn, found, lockstep):
    accumulator, model = accumulator_of(loss_fn, lockstep=lockstep)
    with assert_leaves_no_trace(model), pytest.raises(wb.MeetingError, match=found) as error:
        accumulator.step(pairs(ROWS, torch.float64))
    assert error.value.hint


@pytest.mark.parametrize("again", [False, True])
def test_a_window_of_ones_own_refuses_to_meet_with_a_hint(again):
    """The first micro-batch may be the only one; the second one shows that it was not."""
    accumulator, model = accumulator_of(None)
    batch = pairs(4, torch.float64)
    with assert_leaves_no_trace(model):
        window = accumulator.window()
        window.backward(two_sided(model, batch), targets=4)
        with pytest.raises(wb.MeetingError, match="they come one by one") as error:
            window.backward(two_sided(model, batch) if again else model(batch["a"]).mean(), targets=4)
        if window.is_open:
            window.rollback()
    assert "accumulator.step(batch)" in error.value.hint
    assert wb.gather(batch["a"]) is batch["a"]
    with accumulator.window() as window:
        window.backward(two_sided(model, batch), targets=4)
        with torch.no_grad():
            two_sided(model, batch)  # an evaluation inside the window
    assert window.update.applied


def test_windows_that_end_in_another_order_leave_nobody_behind():
    one, _ = accumulator_of(None)
    two, model = accumulator_of(None)
    first_window, second_window = one.window(), two.window()
    first_window.rollback()
    second_window.backward(model(pairs(4, torch.float64)["a"]).mean(), targets=4)
    second_window.close()
    x = torch.zeros(3, 2)
    assert wb.gather(x) is x


def test_in_a_loader_a_micro_batch_that_meets_after_others_did_not_is_an_error():
    def loss_fn(model, batch):
        x = model(batch["a"])
        return x.sum() if len(x) == 4 else contrast(x, x)

    accumulator, model = accumulator_of(loss_fn)
    parts = [pairs(4, torch.float64), pairs(3, torch.float64)]
    with assert_leaves_no_trace(model), pytest.raises(wb.MeetingError, match="an earlier micro-batch of this window"):
        list(accumulator.updates(parts, micro_batches=2))


@BOTH
def test_what_all_read_is_not_to_be_changed_in_place(lockstep):
    def loss_fn(model, batch):
        x = model(batch["a"])
        ids = wb.gather(batch["length"])
        ids += 1
        return contrast(x, x) + 0.0 * ids.sum()

    accumulator, model = accumulator_of(loss_fn, lockstep=lockstep)
    with assert_leaves_no_trace(model), pytest.raises(wb.MeetingError, match="was changed in place"):
        accumulator.step(pairs(ROWS, torch.float64))


@BOTH
def test_what_all_read_with_a_gradient_is_not_to_be_changed_in_place_either(lockstep):
    def loss_fn(model, batch):
        x = model(batch["a"])
        return F.cross_entropy(x @ wb.gather(x).mul_(2).T, wb.own_rows(x))

    accumulator, model = accumulator_of(loss_fn, lockstep=lockstep)
    with assert_leaves_no_trace(model), pytest.raises(wb.MeetingError, match="was changed in place") as error:
        accumulator.step(pairs(ROWS, torch.float64))
    assert "x.clone()" in error.value.hint


def test_what_was_brought_is_not_to_be_changed_in_place_in_a_replay():
    def loss_fn(model, batch):
        x = model.encoder(batch["a"])
        everyone = wb.gather(x)
        x *= 2
        return F.cross_entropy(x @ everyone.T, wb.own_rows(x))

    accumulator, model = accumulator_of(loss_fn)
    with (
        assert_leaves_no_trace(model),
        pytest.raises(wb.MeetingError, match="A tensor was changed after it had been") as error,
    ):
        accumulator.step(pairs(ROWS, torch.float64))
    assert "x.clone()" in error.value.hint


def test_a_loader_that_looks_at_all_its_rows_is_no_micro_batch():
    def loader():
        for _ in range(4):
            batch = pairs(4, torch.float64)
            assert wb.gather(batch["a"]) is batch["a"]
            yield batch

    accumulator, _ = accumulator_of(two_sided)
    assert [update.micro_batches for update in accumulator.updates(loader(), micro_batches=2)] == [2, 2]
    accumulator, _ = accumulator_of(lambda model, batch: model(batch["a"]).mean())
    assert [update.micro_batches for update in accumulator.updates(loader(), micro_batches=2)] == [2, 2]


def test_a_second_pass_that_is_not_the_first_one_is_an_error():
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        x = model(batch["a"])
        loss = contrast(x, x)
        return loss if len(calls) < 6 else loss + wb.gather(x).sum()

    accumulator, model = accumulator_of(loss_fn)
    with assert_leaves_no_trace(model), pytest.raises(wb.MeetingError, match="in its second pass") as error:
        accumulator.step(pairs(ROWS, torch.float64))
    assert 'lockstep="joined"' in error.value.hint

    def shorter(model, batch):
        calls.append(1)
        x = model(batch["a"])
        return contrast(x, x) if len(calls) < 6 else x.sum()

    calls.clear()
    accumulator, _ = accumulator_of(shorter)
    with pytest.raises(wb.MeetingError, match="ends in its second pass"):
        accumulator.step(pairs(ROWS, torch.float64))


# Errors of the user, and shortages


class BrokenError(Exception):
    pass


@BOTH
@pytest.mark.parametrize("where", ["before", "after", "backward"])
@pytest.mark.parametrize("what", [BrokenError, KeyboardInterrupt, SystemExit])
def test_an_error_in_one_micro_batch_ends_all_and_comes_out_unchanged(what, where, lockstep):
    raised = what("here")
    seen = []

    def fail(*_):
        raise raised

    def loss_fn(model, batch):
        x = model(batch["a"])
        if where == "before" and last(batch):
            fail()
        loss = contrast(x, x)
        if where == "after" and last(batch):
            fail()
        if where == "backward" and x.requires_grad:
            x.register_hook(fail)
        seen.append(1)
        return loss

    accumulator, model = accumulator_of(loss_fn, lockstep=lockstep)
    with assert_leaves_no_trace(model), pytest.raises(what) as error:
        accumulator.step(pairs(ROWS, torch.float64))
    assert error.value is raised
    assert accumulator.open_window is None


@BOTH
def test_user_code_that_catches_everything_does_not_hold_the_others_up(lockstep):
    def loss_fn(model, batch):
        x = model(batch["a"])
        if last(batch):
            raise BrokenError
        try:
            everyone = wb.gather(x)
        except BaseException:
            everyone = x
        return everyone.sum()

    accumulator, model = accumulator_of(loss_fn, lockstep=lockstep)
    with assert_leaves_no_trace(model), pytest.raises(BrokenError):
        accumulator.step(pairs(ROWS, torch.float64))


@BOTH
def test_ctrl_c_while_micro_batches_wait_for_each_other(lockstep):
    """The main thread waits for a micro-batch; the interrupt ends all threads and rolls back."""

    def loss_fn(model, batch):
        x = model(batch["a"])
        if last(batch) and threading.current_thread() is not threading.main_thread():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        return contrast(x, x)

    accumulator, model = accumulator_of(loss_fn, lockstep=lockstep)
    with assert_leaves_no_trace(model), pytest.raises(KeyboardInterrupt):
        accumulator.step(pairs(ROWS, torch.float64))
    assert accumulator.open_window is None


@BOTH
@pytest.mark.parametrize("where", ["forward", "after", "backward"])
def test_a_shortage_in_either_pass_is_retried_with_a_finer_cut(where, lockstep):
    """Weights, buffers and random state are those of a run that had the finer cut from the start, bit for bit."""
    failed = []

    def build():
        torch.manual_seed(0)
        model = Towers(0.5).double()
        model.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        return model

    def run_out(*_):
        failed.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def train(rows, fails):
        def loss_fn(model, batch):
            model.passes += 1
            x = model(batch["a"])
            due = fails and not failed and last(batch) and model.passes > 3
            if due and where == "forward":
                run_out()
            loss = contrast(x, x)
            if due and where == "after":
                run_out()
            if due and where == "backward" and x.requires_grad:
                x.register_hook(run_out)
            return loss

        model = build()
        accumulator, _ = accumulator_of(loss_fn, model, micro_batch=wb.Rows(rows), lockstep=lockstep)
        torch.manual_seed(5)
        made = [accumulator.step(pairs(12, torch.float64)) for _ in range(2)]
        return state_of(model), made

    def last(batch):
        return torch.equal(batch["a"][-1], numbers(12, 6)[-1])

    clean, _ = train(2, fails=False)
    found, made = train(4, fails=True)
    assert len(failed) == 1
    assert sum(update.retries for update in made) == 1
    if made[0].retries:
        assert [name for name in clean if clean[name] != found[name]] == []


# Random numbers and buffers


def drawing(model, batch):
    """Dropout, and numbers of Python and NumPy, before, between and after meetings."""
    x = model(batch["a"]) * random.uniform(0.5, 1.5)
    everyone = wb.gather(x)
    y = model(batch["b"]) + torch.randn(8, dtype=torch.float64) * np.random.rand()
    loss = F.cross_entropy(F.dropout(y, 0.2) @ everyone.T, wb.own_rows(x))
    others = wb.gather(y)
    return loss + F.cross_entropy(F.dropout(x, 0.3) @ others.T * random.random(), wb.own_rows(x))


def test_both_executions_draw_the_same_random_numbers():
    """The joined graph runs once; the replay, which runs twice, has the same gradient and leaves the same state."""
    found = {}
    for lockstep in ("replay", "joined"):
        torch.manual_seed(1)
        accumulator, model = accumulator_of(drawing, Towers(0.5).double(), lockstep=lockstep)
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        accumulator.step(pairs(ROWS, torch.float64))
        found[lockstep] = flat(model.parameters()), torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    assert relative_error(found["replay"][0], found["joined"][0]) <= FP64
    assert torch.equal(found["replay"][1], found["joined"][1])
    assert found["replay"][2:] == found["joined"][2:]


def test_the_comparison_sees_masks_that_are_drawn_anew(monkeypatch):
    monkeypatch.setattr("wholebatch.engine.transaction.RandomState.restore", lambda *_: None)
    found = {}
    for lockstep in ("replay", "joined"):
        torch.manual_seed(1)
        accumulator, model = accumulator_of(drawing, Towers(0.5).double(), lockstep=lockstep)
        torch.manual_seed(3)
        accumulator.step(pairs(ROWS, torch.float64))
        found[lockstep] = flat(model.parameters())
    assert relative_error(found["replay"], found["joined"]) > 1e-3


def test_no_two_micro_batches_draw_the_same():
    masks = []

    def loss_fn(model, batch):
        masks.append(torch.rand(3).tolist())
        x = model(batch["a"])
        everyone = wb.gather(x)
        masks.append(torch.rand(3).tolist())
        return everyone.sum()

    accumulator, _ = accumulator_of(loss_fn, lockstep="joined", micro_batch=wb.Rows(2))
    accumulator.step(pairs(ROWS, torch.float64))
    masks = masks[1:]  # of the micro-batch that found out
    assert len({tuple(mask) for mask in masks}) == len(masks) == 12


class Remembers(nn.Module):
    """Its output depends on a buffer that every forward pass changes, twice a loss; another is put in its place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("passes", torch.zeros((), dtype=torch.float64))
        self.register_buffer("last", torch.zeros(6))

    def forward(self, x):
        self.passes += 1
        self.last = self.last + x.detach().sum(0)
        return self.norm(torch.tanh(self.layer(x) * (1 + 0.1 * self.passes) + 0.01 * self.last.mean()))


def test_buffers_are_replayed_and_move_once():
    found = {}
    for lockstep in ("replay", "joined"):
        torch.manual_seed(1)
        model = Remembers().double()
        accumulator, _ = accumulator_of(
            lambda model, batch: (
                contrast(model(batch["a"]), model(batch["b"])) + contrast(model(batch["a"]), batch["c"])
            ),
            model,
            lockstep=lockstep,
            batch_norm="per_micro_batch",
        )
        accumulator.step({**pairs(12, torch.float64), "c": numbers(12, 8, seed=9)})
        found[lockstep] = flat(model.parameters()), dict(model.named_buffers())
    assert relative_error(found["replay"][0], found["joined"][0]) <= FP64
    for name, buffer in found["joined"][1].items():
        torch.testing.assert_close(found["replay"][1][name], buffer, rtol=FP64, atol=FP64)
    assert int(found["joined"][1]["passes"]) == 9


# What PyTorch keeps for each thread


@BOTH
def test_surroundings_of_the_caller_are_those_of_every_micro_batch(lockstep):
    seen = []

    class Counts(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            return function(*arguments, **(options or {}))

    def loss_fn(model, batch):
        seen.append(
            (
                torch.is_autocast_enabled("cpu"),
                len(torch.overrides._get_current_function_mode_stack()),
                torch.zeros(1).device.type,
            )
        )
        x = model(batch["a"])
        wb.gather(torch.zeros(len(x), device="cpu"))
        return x.float().sum()

    accumulator, _ = accumulator_of(loss_fn, Towers(), lockstep=lockstep, micro_batch=wb.Tokens(18, length=length_of))
    batch = pairs(ROWS, torch.float32)
    with torch.device("meta"), Counts(), torch.autocast("cpu", torch.bfloat16):
        accumulator.step(batch)
    assert len(seen) > 3
    assert set(seen) == {(True, 2, "meta")}


@BOTH
def test_saved_tensor_hooks_of_the_caller_reach_every_micro_batch(lockstep):
    packed = []

    def pack(tensor):
        packed.append(threading.current_thread().name)
        return tensor

    accumulator, _ = accumulator_of(two_sided, lockstep=lockstep)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        accumulator.step(pairs(ROWS, torch.float64))
    assert "wholebatch micro-batch" in packed


def test_saved_tensors_wait_in_the_memory_of_the_host(monkeypatch):
    """On a CPU with hooks that are those of an accelerator: the update is the same, and weights stay where they are."""
    brought_back = []

    def counting(pack, unpack):
        def count(packed):
            brought_back.append(isinstance(packed, tuple))
            return unpack(packed)

        return pack, count

    batch, animal = pairs(ROWS, torch.float64), MEETING["two-sided"]
    right = change(animal, undivided(animal), [batch])
    monkeypatch.setattr(joined, "_OFFLOADING", {"cpu"})
    offload_hooks = joined.offload_hooks
    monkeypatch.setattr(joined, "offload_hooks", lambda *given: counting(*offload_hooks(*given)))
    assert relative_error(change(animal, stepped(animal, wb.Rows(4), lockstep="joined"), [batch]), right) <= FP64
    assert {True, False} == set(brought_back)
    brought_back.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert relative_error(change(animal, stepped(animal, wb.Rows(4), lockstep="joined"), [batch]), right) <= FP64
    assert brought_back == []


@BOTH
def test_meetings_inside_activation_checkpointing(lockstep):
    """Recomputed parts take what their meeting came to: of two meetings in one line, each its own."""

    def meets(model, left, right, own):
        x = [model(left), model(right)]
        lefts, rights = (wb.gather(each) for each in x)
        return F.cross_entropy(x[0] @ (rights * rights).T, own) + 0.3 * F.cross_entropy(x[1] @ (lefts * lefts).T, own)

    def loss_fn(model, batch):
        return checkpoint(meets, model, batch["a"], batch["b"], wb.own_rows(batch["a"]), use_reentrant=False)

    def plain(model, batch):
        left, right = model(batch["a"]), model(batch["b"])
        own = torch.arange(len(left))
        both = F.cross_entropy(left @ (right * right).T, own), F.cross_entropy(right @ (left * left).T, own)
        return both[0] + 0.3 * both[1]

    batch = pairs(ROWS, torch.float64)
    animal, right = Animal(Towers, pairs, loss_fn), Animal(Towers, pairs, plain)
    whole = gradient_of(right, undivided(right), batch, dtype=torch.float64)
    found = gradient_of(animal, stepped(animal, wb.Rows(4), lockstep=lockstep), batch, dtype=torch.float64)
    assert relative_error(found, whole) <= FP64


class Expert(nn.Module):
    """Tokens, numbers and shares meet in one line; `alike`: some that other layers and micro-batches bring too."""

    def __init__(self):
        super().__init__()
        self.router, self.expert = nn.Linear(5, 3), nn.Linear(5, 5)

    def forward(self, x):
        p = self.router(x).softmax(-1)
        alike = functional_share(p)
        mean = (wb.sum_over_batch(p.sum(0)) * wb.sum_over_batch(alike) / wb.sum_over_batch(len(x))).square().sum()
        near = wb.gather(p)[:, 0].mean() * wb.gather(alike.expand(len(x), -1).round().long()).double().mean()
        return x + self.expert(x).tanh(), wb.losses.load_balancing(p) + mean + near


def functional_share(p):
    return F.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype).sum(0)


class Experts(nn.Module):
    def __init__(self, again):
        super().__init__()
        self.layers, self.head, self.again = nn.ModuleList(Expert() for _ in range(3)), nn.Linear(5, 3), again

    def forward(self, x):
        balance = 0.0
        for layer in self.layers:
            x, more = checkpoint(layer, x, use_reentrant=False) if self.again else layer(x)
            balance = balance + more
        return self.head(x), balance


@BOTH
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_meetings_in_several_checkpointed_parts_are_told_apart(rows, lockstep):
    """By part and order: what is brought may be the same, and is a number here and a tensor there."""

    def loss_fn(model, batch):
        y, balance = model(batch["x"])
        return F.mse_loss(y, batch["y"]) + 0.1 * balance

    plain = Animal(lambda: Experts(False), regression, loss_fn)
    again = Animal(lambda: Experts(True), regression, loss_fn)
    batch = regression(ROWS, torch.float64)
    options = {"dtype": torch.float64}
    right = gradient_of(plain, stepped(plain, wb.Rows(rows), lockstep=lockstep), batch, **options)
    found = gradient_of(again, stepped(again, wb.Rows(rows), lockstep=lockstep), batch, **options)
    assert relative_error(found, right) <= FP64


@BOTH
def test_what_knows_its_place_is_not_to_be_recomputed(lockstep):
    def asks(model, x):
        x = model(x)
        return F.cross_entropy((x * x) @ wb.gather(x).square().T, wb.own_rows(x)).square()

    accumulator, model = accumulator_of(
        lambda model, batch: checkpoint(asks, model, batch["a"], use_reentrant=False), lockstep=lockstep
    )
    with (
        assert_leaves_no_trace(model),
        pytest.raises(wb.MeetingError, match=r"wb\.own_rows was called in a part") as error,
    ):
        accumulator.step(pairs(ROWS, torch.float64))
    assert "outside of the checkpointed function" in error.value.hint


@BOTH
def test_reentrant_checkpointing_around_a_meeting_is_refused_and_beside_it_is_fine(lockstep):
    def around(model, batch):
        x = batch["a"].requires_grad_()
        return checkpoint(lambda x: contrast(model(x), model(x)), x, use_reentrant=True)

    accumulator, _ = accumulator_of(around, lockstep=lockstep)
    with pytest.raises((wb.MeetingError, wb.LossError)) as error:
        accumulator.step(pairs(ROWS, torch.float64))
    assert "use_reentrant" in str(error.value)

    def beside(model, batch):
        x = model.encoder[0](batch["a"])
        x = checkpoint(model.encoder[1:], x, use_reentrant=True)
        return contrast(x, x)

    animal = Animal(Towers, pairs, beside)
    batch = pairs(ROWS, torch.float64)
    right = change(animal, undivided(animal), [batch])
    assert relative_error(change(animal, stepped(animal, wb.Rows(4), lockstep=lockstep), [batch]), right) <= FP64


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_in_compiled_parts_a_meeting_breaks_the_graph():
    class LooksAround(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            x = self.layer(x)
            everyone = wb.gather(x)
            return x + (x @ everyone.T).softmax(1) @ everyone

    found = []
    for rows in (99, 4):
        torch.manual_seed(0)
        model = LooksAround().double()
        compiled = torch.compile(model, backend="eager") if rows == 4 else model
        accumulator_of(
            lambda model, batch: F.mse_loss(model(batch["a"]), batch["b"]), compiled, micro_batch=wb.Rows(rows)
        )[0].step(pairs(ROWS, torch.float64))
        found.append(flat(model.parameters()))
    assert relative_error(found[1], found[0]) <= FP64


# The first check, and verify


def test_the_first_check_accepts_what_meets_and_verify_too():
    for name, animal in MEETING.items():
        model = animal.model()
        accumulator = wb.Accumulator(model, sgd(model.parameters()), animal.loss_fn, micro_batch=wb.Rows(4))
        accumulator.step(pairs(ROWS, torch.float64))
        assert "compared cut and uncut on 8 rows: equal to" in accumulator.reasons[0], name
        found = wb.verify(
            model, animal.loss_fn, pairs(ROWS, torch.float64), micro_batch=wb.Tokens(20, length=length_of)
        )
        assert found.ok, found
        assert found.error <= FP64


def test_a_loss_that_meets_and_still_takes_its_rows_for_all_is_found():
    """Its labels are the first places, which are those of another micro-batch."""

    def mistaken(model, batch):
        x = model(batch["a"])
        return F.cross_entropy(x @ wb.gather(model(batch["b"])).T, torch.arange(len(x)))

    accumulator, model = accumulator_of(mistaken, check="first")
    with (
        assert_leaves_no_trace(model),
        pytest.raises(wb.VerifyError, match="The micro-batches meet, and still") as error,
    ):
        accumulator.step(pairs(ROWS, torch.float64))
    assert "wb.own_rows" in error.value.hint
    found = wb.verify(model, mistaken, pairs(ROWS, torch.float64))
    assert not found.ok
    assert [cause.name for cause in found.causes] == ["not a sum over rows"]


def test_a_loss_that_ought_to_meet_is_told_how():
    model = mlp().double()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), CONTRASTIVE.loss_fn, micro_batch=wb.Rows(4))
    with pytest.raises(wb.VerifyError, match=r"wb\.gather\(x\) returns the rows of the whole logical batch"):
        accumulator.step(regression(ROWS, torch.float64))


def test_a_loop_of_ones_own_in_which_nobody_meets_is_named():
    def own_step(model, optimizer, micro_batches):
        optimizer.zero_grad()
        rows = sum(len(each["a"]) for each in micro_batches)
        for each in micro_batches:
            (two_sided(model, each) * len(each["a"]) / rows).backward()
        optimizer.step()

    found = wb.verify(Towers().double(), two_sided, pairs(12, torch.float64), step=own_step)
    assert not found.ok
    assert "each micro-batch is alone" in found.causes[0].found
    assert "wb.Accumulator" in found.causes[0].hint


# Losses


def test_losses_outside_an_accumulator_are_ordinary_ones():
    query, key, hard = numbers(5, 3), numbers(5, 3, seed=1), numbers(5, 2, 3, seed=2)
    plain = F.cross_entropy(query @ key.T / 0.2, torch.arange(5))
    torch.testing.assert_close(wb.losses.info_nce(query, key, temperature=0.2), plain)
    other = F.cross_entropy(key @ query.T / 0.2, torch.arange(5))
    torch.testing.assert_close(wb.losses.info_nce(query, key, temperature=0.2, symmetric=True), (plain + other) / 2)
    more = F.cross_entropy(query @ torch.cat([key, hard.flatten(0, 1)]).T, torch.arange(5))
    torch.testing.assert_close(wb.losses.info_nce(query, key, temperature=1.0, negatives=hard), more)
    single = wb.losses.info_nce(query, key, temperature=1.0, negatives=hard[:, 0])
    assert single < more


@pytest.mark.parametrize("tile", [1, 5, 64, 1000])
def test_tiles_change_memory_and_not_the_loss(tile):
    """The similarities of 64 rows with 4096 candidates take 1 MiB; of a tile its share, and nothing is kept."""
    queries, keys = (numbers(64, 8, dtype=torch.float32, seed=seed).requires_grad_() for seed in (0, 1))
    negatives = numbers(64, 63, 8, dtype=torch.float32, seed=2)
    scale = torch.tensor(0.5, requires_grad=True)

    def run(**options):
        with Timeline(torch.device("cpu")) as timeline:
            loss = wb.losses.info_nce(queries, keys, temperature=scale, negatives=negatives, **options)
            found = torch.autograd.grad(loss, [queries, keys, scale])
        return [loss.detach(), *found], timeline.peak_bytes

    right, whole = run()
    found, peak = run(tile=tile)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
    if tile < 64:
        assert peak < 0.6 * whole
    with pytest.raises(wb.LossError, match="holds nothing"):
        run(tile=0)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda x: wb.losses.info_nce(x, x, temperature=0), "temperature=0"),
        (lambda x: wb.losses.info_nce(x, x, temperature="warm"), "temperature='warm'"),
        (lambda x: wb.losses.info_nce(x, x, tile=1.5), "tile of 1.5"),
        (lambda x: wb.losses.batch_hard_triplet(x, x[:, 0], margin="hard"), "margin='hard'"),
        (lambda x: wb.losses.load_balancing(x, x[:, 0]), "chosen experts are torch.float64"),
        (lambda x: wb.losses.load_balancing(x, torch.full((len(x),), -1)), "experts go from -1 to -1, and there are"),
        (lambda x: wb.losses.load_balancing(x.sum()), r"probabilities \(\) have no experts"),
        (lambda x: wb.losses.info_nce(x, x, temperature=torch.ones(x.shape[1])), r"temperature of shape \(\d+,\)"),
    ],
)
def test_arguments_of_a_wrong_kind_are_named(make, found):
    with pytest.raises(wb.LossError, match=found):
        make(numbers(4, 3))


def test_batch_hard_triplets_by_a_plain_loop():
    x, labels = numbers(9, 4), torch.tensor([0, 1, 0, 2, 1, 1, 0, 3, 2])
    each = []
    for anchor in range(9):
        distances = (x - x[anchor]).norm(dim=1)
        likes = [d for other, d in enumerate(distances) if labels[other] == labels[anchor] and other != anchor]
        others = [d for other, d in enumerate(distances) if labels[other] != labels[anchor]]
        each.append(max(torch.tensor(0.0).double(), 0.4 + max(likes) - min(others)) if likes else torch.tensor(0.0))
    torch.testing.assert_close(wb.losses.batch_hard_triplet(x, labels, margin=0.4), torch.stack(each).double().mean())
    assert wb.losses.batch_hard_triplet(x, torch.zeros(9)) == 0
    assert wb.losses.batch_hard_triplet(x, labels, margin="soft") > 0
    assert wb.losses.batch_hard_triplet(x.bfloat16(), labels).dtype == torch.float32


def test_load_balancing_counts_what_is_masked_in():
    probabilities = numbers(2, 3, 4).softmax(-1)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    kept = probabilities[mask]
    share = F.one_hot(kept.argmax(-1), 4).double().mean(0)
    torch.testing.assert_close(wb.losses.load_balancing(probabilities, mask=mask), 4 * (share * kept.mean(0)).sum())
    top = probabilities.topk(2, dim=-1).indices
    two = F.one_hot(top, 4).sum(-2).double().flatten(0, 1).mean(0)
    torch.testing.assert_close(
        wb.losses.load_balancing(probabilities, top), 4 * (two * probabilities.flatten(0, 1).mean(0)).sum()
    )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: wb.losses.info_nce(numbers(4, 3), numbers(5, 3)),
        lambda: wb.losses.info_nce(numbers(4, 3), numbers(4, 3), negatives=numbers(5, 3)),
        lambda: wb.losses.batch_hard_triplet(numbers(4, 3), torch.zeros(5)),
        lambda: wb.losses.load_balancing(numbers(4, 3), torch.zeros(5, dtype=torch.long)),
        lambda: wb.losses.load_balancing(numbers(4, 3), mask=torch.zeros(5)),
    ],
)
def test_shapes_that_do_not_fit_are_named(wrong):
    with pytest.raises(wb.LossError, match="hint: pass"):
        wrong()


@pytest.mark.accelerator
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs a CUDA, ROCm, XPU or MPS device")
@BOTH
def test_on_an_accelerator(lockstep):
    device = torch.accelerator.current_accelerator()
    torch.manual_seed(0)
    model = Towers().to(device)
    whole = Towers().to(device)
    whole.load_state_dict(model.state_dict())
    batch = pairs(ROWS, torch.float32)
    for each, rows in ((model, 4), (whole, 99)):
        wb.Accumulator(each, sgd(each.parameters()), two_sided, micro_batch=wb.Rows(rows), lockstep=lockstep).step(
            batch
        )
    for one, two in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    with contextlib.suppress(AttributeError):
        torch.accelerator.synchronize()


def test_accumulators_in_several_threads_recompute_in_a_company_of_their_own():
    """Both are inside of a backward pass at the same time, and what has met holds tensors that are not compared."""
    sides = [Alone(), Alone()]
    turns = threading.Barrier(2, timeout=60)
    found = {}

    def recompute(number):
        def look(_gradient):
            turns.wait()
            found[number] = here()
            turns.wait()

        weight = torch.ones(2, requires_grad=True)
        with among(sides[number]):
            wb.gather(weight * 1.0)
        with recomputing_with(sides[number]):
            part = weight * 2
            part.register_hook(look)
            part.sum().backward()

    threads = [threading.Thread(target=recompute, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] is sides[number] for number in range(2)] == [True, True]
