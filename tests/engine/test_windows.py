"""One window on tensors: what it waits for, what it keeps, its order of use, and what it says of bad losses."""

import contextlib
import gc
import math
import types
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode

import wholebatch as wb
from menagerie import CALM, mean_square, mlp, numbers, regression
from properties import assert_leaves_no_trace, flat, relative_error, sgd
from wholebatch.engine.objective import Part


def one_window(**options):
    torch.manual_seed(0)
    model = mlp().double()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), **options)
    return model, accumulator, accumulator.window()


# No wait for the device inside a window.


class Reads(TorchDispatchMode):
    """Counts how often a tensor is asked for its value."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return function(*arguments, **(keywords or {}))


@pytest.fixture
def reads(monkeypatch):
    """Reads by dispatch and by ``tolist``, which needs no dispatch on a CPU."""
    mode, tolist = Reads(), torch.Tensor.tolist

    def counted(tensor):
        mode.count += 1
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    with mode:
        yield mode


LOSSES = {
    "rows": (mean_square, {}),
    "a pair": (lambda m, b: (mean_square(m, b) * b["y"].numel(), torch.tensor(b["y"].numel())), {}),
    "a pair with once": (lambda m, b: (mean_square(m, b) * 9, torch.tensor(9), m[0].weight.norm()), {}),
}


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.1}, {"precision": "fp16"}], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_window_reads_once_and_after_its_last_backward_pass(reads, loss, options):
    loss_fn, more = LOSSES[loss]
    seen = []

    def loss_and_reads(model, batch):
        result = loss_fn(model, batch)
        first = result[0] if isinstance(result, tuple) else result
        first.register_hook(lambda _: seen.append(reads.count))
        return result

    torch.manual_seed(0)
    model = mlp()
    accumulator = wb.Accumulator(
        model, sgd(model.parameters()), loss_and_reads, micro_batch=wb.Rows(2), check=None, **options, **more
    )
    batch = regression(8, torch.float32)
    reads.count = 0
    update = accumulator.step(batch)
    assert update.micro_batches == 4
    on_cpu = 4 if loss != "rows" else 0  # counts that lie on a CPU may be read: that waits for nobody
    assert seen[-1] <= on_cpu
    scaler = 2 if options.get("precision") == "fp16" else 0
    assert reads.count - seen[-1] <= 1 + scaler


@pytest.mark.parametrize("once", [False, True])
def test_a_window_on_a_device_that_cannot_be_read_fails_only_at_its_one_read(monkeypatch, once):
    """Tensors on "meta" have no values: any read inside the window would raise there and then."""
    no_stream = types.SimpleNamespace(get_rng_state=lambda _: None, set_rng_state=None)
    monkeypatch.setattr(torch, "get_device_module", lambda _: no_stream)
    model = mlp().to("meta")
    accumulator = wb.Accumulator(model, sgd(model.parameters()), mean_square, clip_norm=1.0)
    for targets in (None, torch.tensor(6, device="meta")):
        window = accumulator.window(targets=targets)
        for _ in range(3):
            batch = {"x": torch.empty(2, 5, device="meta"), "y": torch.empty(2, 3, device="meta")}
            loss, count = mean_square(model, batch), torch.tensor(2, device="meta")
            if once:
                window.backward((loss, count, model[0].weight.norm()))
            else:
                window.backward(loss, targets=count)
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            window.close()
        assert not window.is_open


def test_the_test_on_meta_sees_a_read():
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        torch.tensor(2, device="meta").item()


# No lasting reference to a micro-batch.


def watch(loss_fn):
    """At each call, everything of the call before must be gone."""
    alive: list[weakref.ref] = []
    found: list[int] = []

    def watched(model, batch):
        found.append(sum(ref() is not None for ref in alive))
        alive.clear()
        hidden = torch.tanh(model[0](batch["x"]))
        output = model[2](hidden)
        loss = mse_loss(output, batch["y"])
        alive.extend(weakref.ref(x) for x in (batch["x"], batch["y"], hidden, output, loss))
        return loss_fn(loss, batch)

    return watched, found


@pytest.mark.parametrize("way", ["step", "updates", "window"])
@pytest.mark.parametrize("kind", ["loss", "pair"])
def test_nothing_of_a_micro_batch_is_alive_when_the_next_one_begins(way, kind):
    loss_fn, found = watch((lambda loss, _: loss) if kind == "loss" else (lambda loss, _: (loss * 2, torch.tensor(2))))
    torch.manual_seed(0)
    model = mlp().double()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), loss_fn, micro_batch=wb.Rows(2), check=None)
    gc.disable()
    try:
        if way == "step":
            accumulator.step(regression(8, torch.float64))
        elif way == "updates":
            list(accumulator.updates((regression(2, torch.float64) for _ in range(4)), micro_batches=4))
        else:
            with accumulator.window() as window:
                for _ in range(4):
                    window.backward(loss_fn(model, regression(2, torch.float64)), 2 if kind == "loss" else None)
    finally:
        gc.enable()
    assert found == [0, 0, 0, 0]


@pytest.mark.parametrize("way", ["step", "updates", "add"])
def test_nothing_of_a_micro_batch_is_alive_after_its_loss_has_raised(way):
    """What was raised and the frames that it came through do not keep each other until a collector comes by."""
    kept = []

    def loss_fn(model, batch):
        output = model(batch["x"])
        kept.append(weakref.ref(output))
        if len(kept) > 1:
            raise LookupError("a bad sample")
        return mse_loss(output, batch["y"])

    model = mlp().double()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), loss_fn, micro_batch=wb.Rows(2), check=None)
    gc.disable()
    try:
        with contextlib.suppress(LookupError):
            if way == "step":
                accumulator.step(regression(8, torch.float64))
            elif way == "updates":
                list(accumulator.updates([regression(2, torch.float64)] * 4, micro_batches=4))
            else:
                accumulator.add(regression(2, torch.float64))
                accumulator.add(regression(2, torch.float64))
        assert [ref() is None for ref in kept] == [True, True]
        if accumulator.open_window is not None:
            accumulator.open_window.rollback()
        lost = weakref.ref(accumulator)
        del accumulator
        assert lost() is None
    finally:
        gc.enable()


def test_a_meeting_in_a_window_of_ones_own_keeps_nothing_of_its_micro_batch():
    model, _, window = one_window()
    output = model(numbers(4, 5))
    kept = weakref.ref(output)
    window.backward(wb.gather(output).square().mean(), targets=4)
    gc.disable()
    try:
        del output
        assert kept() is None
    finally:
        gc.enable()
    assert window.close().applied


def test_the_watch_sees_a_loss_that_is_kept():
    kept = []
    loss_fn, found = watch(lambda loss, _: kept.append(loss) or loss)
    torch.manual_seed(0)
    model = mlp().double()
    wb.Accumulator(model, sgd(model.parameters()), loss_fn, micro_batch=wb.Rows(2), check=None).step(
        regression(4, torch.float64)
    )
    assert found[1] > 0


def test_a_loss_that_is_a_view_does_not_keep_what_it_is_a_part_of():
    model, _, window = one_window()
    outputs = model(numbers(4, 5))
    storage = weakref.ref(outputs.untyped_storage())
    window.backward(outputs[0, 0], targets=1)
    del outputs
    gc.collect()
    assert storage() is None
    assert math.isfinite(window.close().loss)


# The loss in the record.


@pytest.mark.parametrize("counted", [int, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize("micro_batches", [1, 3, 600])
def test_the_loss_of_the_record_is_that_of_the_logical_batch(counted, micro_batches):
    """Also when a window has more losses than it keeps apart."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1).double()
    accumulator = wb.Accumulator(model, sgd(model.parameters()))
    total, targets = 0.0, 0
    with accumulator.window() as window:
        for k in range(micro_batches):
            rows = k % 3 + 1
            loss = model(numbers(rows, 2, seed=k)).square().mean()
            total, targets = total + loss.item() * rows, targets + rows
            window.backward(loss, targets=counted(rows))
    assert window.update.loss == pytest.approx(total / targets, rel=1e-12)
    assert window.update.targets == targets
    assert window.update.micro_batches == micro_batches


def test_a_count_that_needs_a_gradient_keeps_no_graph():
    """Learned sample weights: what the loss is divided by is a number, not a part of the graph."""
    model, _, window = one_window()
    weights = torch.ones(4, dtype=torch.float64, requires_grad=True)
    factors = torch.full((4,), 2.0, dtype=torch.float64)
    saved_in_the_graph = weakref.ref(factors)
    window.backward(mean_square(model, regression(4, torch.float64)), targets=(weights * factors).sum())
    del factors
    gc.collect()
    assert saved_in_the_graph() is None
    assert window.close().targets == 8
    assert weights.grad is None


# The order in which a window may be used.


def test_a_window_ends_once():
    model, accumulator, window = one_window()
    loss = mean_square(model, regression(4, torch.float64))
    window.backward(loss, targets=4)
    window.close()
    for late in (window.close, window.rollback, lambda: window.backward(loss, targets=4)):
        with pytest.raises(wb.WindowError, match="after it was closed") as error:
            late()
        assert "accumulator.window()" in error.value.hint
    window = accumulator.window()
    window.rollback()
    with pytest.raises(wb.WindowError, match="cannot close after it was rolled back"):
        window.close()


def test_a_window_whose_handle_was_lost_can_be_found_again():
    """As in a notebook, when a function that opened it has raised."""
    _, accumulator, window = one_window()
    assert accumulator.open_window is window
    accumulator.open_window.rollback()
    assert accumulator.open_window is None
    assert not window.is_open


def test_a_record_is_there_after_the_close_and_only_then():
    _, accumulator, window = one_window()
    with pytest.raises(wb.WindowError, match="window that is open") as error:
        _ = window.update
    assert "window.close()" in error.value.hint
    window.rollback()
    with pytest.raises(wb.WindowError, match="window that is rolled back"):
        _ = window.update
    window = accumulator.window()
    update = window.close()
    assert update is window.update
    assert update.skipped


def test_a_window_may_be_closed_or_rolled_back_inside_its_with_block():
    model, accumulator, window = one_window()
    with window:
        window.backward(mean_square(model, regression(4, torch.float64)), targets=4)
        update = window.close()
    assert window.update is update
    with accumulator.window() as window:
        window.rollback()
    assert not window.is_open


def test_known_targets_that_turn_out_otherwise_are_corrected_at_the_close():
    """The window was said to hold 10 targets, and held 8: the gradient is divided by 8."""
    batch = regression(8, torch.float64)
    changes = []
    for said in (None, 10, 8, torch.tensor(10), 0, torch.tensor(0)):
        model, accumulator, window = one_window()
        window.rollback()
        before = flat(model.parameters())
        with accumulator.window(targets=said) as window:
            window.backward(mean_square(model, batch), targets=8)
        changes.append(flat(model.parameters()) - before)
    assert all(relative_error(each, changes[0]) <= 1e-12 for each in changes)


@pytest.mark.parametrize("said", [-1, math.nan, "x", torch.tensor(-1), torch.tensor(math.nan), torch.ones(2)], ids=str)
def test_targets_of_a_window_are_a_number_of_targets(said):
    _, accumulator, window = one_window()
    window.rollback()
    with pytest.raises(wb.WeightError, match="is said to hold"):
        accumulator.window(targets=said)
    assert accumulator.window().is_open


# Bad losses and targets: the window stays open, nothing is lost.

BAD_LOSSES = {
    "not a tensor": (lambda _: 3.0, wb.LossError, "is a float, not a tensor", "output.loss"),
    "no scalar": (
        lambda loss: loss * torch.ones(2, 3),
        wb.LossError,
        r"no scalar: its shape is \(2, 3\)",
        "loss.sum()",
    ),
    "no graph": (lambda loss: loss.detach(), wb.LossError, "no graph", ".detach()"),
    "complex": (lambda loss: loss * 1j, wb.LossError, "is complex", "absolute value"),
    "a tuple of four": (lambda loss: (loss, 1, loss, 1), wb.LossError, "a tuple of 4", "(loss_sum, targets, once)"),
    "no scalar once": (lambda loss: (loss, 1, torch.ones(2)), wb.LossError, "once a window is no scalar", "add it up"),
    "no tensor once": (lambda loss: (loss, 1, 0.5), wb.LossError, "once a window is a float", "return a tensor"),
    "negative pair": (lambda loss: (loss, -3), wb.WeightError, "-3 targets", "0 or more"),
}


@pytest.mark.parametrize("bad", BAD_LOSSES)
def test_a_bad_loss_is_refused_and_its_window_stays_open(bad):
    model, _, window = one_window()
    batch = regression(4, torch.float64)
    window.backward(mean_square(model, batch), targets=4)
    make, kind, found, hint = BAD_LOSSES[bad]
    with pytest.raises(kind, match=found) as error:
        window.backward(make(mean_square(model, batch)), targets=4)
    assert hint in error.value.hint
    assert window.is_open
    assert window.close().targets == 4


@pytest.mark.parametrize("first", [True, False])
def test_a_term_that_acts_once_comes_with_every_micro_batch_or_with_none(first):
    """It enters by shares of the targets: handed in with one micro-batch of two, half of it would be missing."""
    model, accumulator, window = one_window()
    before = [weight.detach().clone() for weight in model.parameters()]
    batch = regression(4, torch.float64)
    for number in range(2):
        once = (model[0].weight.norm(),) if first == (number == 0) else ()
        part = (mean_square(model, batch) * 4, 4, *once)
        if number == 0:
            window.backward(part)
            continue
        with pytest.raises(wb.LossError, match="with some of its micro-batches and not with others") as error:
            window.backward(part)
    assert "with every micro-batch" in error.value.hint
    assert not window.is_open
    assert all(map(torch.equal, model.parameters(), before))
    assert accumulator.open_window is None


@pytest.mark.parametrize(
    ("targets", "found"),
    [(None, "without its targets"), (-1, "-1 targets"), (math.nan, "nan targets"), ("4", "type str")],
)
def test_bad_targets_are_refused_and_their_window_stays_open(targets, found):
    model, _, window = one_window()
    with pytest.raises(wb.WeightError, match=found) as error:
        window.backward(mean_square(model, regression(4, torch.float64)), targets=targets)
    assert error.value.hint
    assert window.is_open
    assert not window.close().applied


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf])
def test_bad_targets_in_a_tensor_are_refused_at_once_where_they_can_be_read(bad):
    model, _, window = one_window()
    loss = mean_square(model, regression(4, torch.float64))
    with pytest.raises(wb.WeightError, match=f"{float(bad)} targets"):
        window.backward(loss, targets=torch.tensor(float(bad)))
    assert window.is_open


def counted_on_a_device(loss, count):
    """A part whose count is a tensor that nobody has read."""
    return Part(loss, "mean", torch.tensor(count))


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("first", [False, True], ids=["second", "first"])
def test_bad_targets_that_a_device_counted_are_found_at_the_close(bad, early, first):
    model, accumulator, window = one_window()
    window.rollback()
    with assert_leaves_no_trace(model):
        window = accumulator.window(targets=4 if early else None)
        for count in (bad, 4.0) if first else (4.0, bad):
            window.add(counted_on_a_device(mean_square(model, regression(4, torch.float64)), count), rows=None)
        with pytest.raises(wb.WeightError, match="targets of a window add up to") as error:
            window.close()
    assert "0 or more" in error.value.hint
    assert not window.is_open


@pytest.mark.parametrize("counts", [(3.0, 0.0, 5.0), (0.0, 8.0), (8.0, 0.0)], ids=str)
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
def test_targets_that_a_device_counted_weigh_exactly(counts, early):
    """Also where it counted none: the loss there has a finite gradient, and a weight of zero."""
    batches = [regression(int(count) or 2, torch.float64) for count in counts]
    model, accumulator, window = one_window()
    window.rollback()
    losses = [count * mean_square(model, batch) for count, batch in zip(counts, batches, strict=True)]
    right = flat(torch.autograd.grad(sum(losses) / sum(counts), list(model.parameters())))
    before = flat(model.parameters())
    window = accumulator.window(targets=torch.tensor(sum(counts)) if early else None)
    for count, batch in zip(counts, batches, strict=True):
        window.add(counted_on_a_device(mean_square(model, batch), count), rows=len(batch["x"]))
    update = window.close()
    assert relative_error(before - flat(model.parameters()), right) <= 1e-12
    assert update.loss == pytest.approx(sum(losses).item() / sum(counts), rel=1e-12)
    assert update.targets == sum(counts)


def test_a_window_in_which_a_device_counted_no_target_is_no_update():
    model, _, window = one_window()
    before = flat(model.parameters())
    window.add(counted_on_a_device(mean_square(model, regression(4, torch.float64)), 0), rows=4)
    update = window.close()
    assert "nothing to learn" in update.skipped
    assert math.isnan(update.loss)
    assert torch.equal(flat(model.parameters()), before)


def test_a_loss_that_no_weight_of_the_optimizer_knows_is_refused():
    _, _, window = one_window()
    stranger = nn.Linear(5, 3).double()
    with pytest.raises(wb.LossError, match="No parameter that the optimizer steps") as error, window:
        window.backward(mean_square(stranger, regression(4, torch.float64)), targets=4)
    assert "weights of the model" in error.value.hint
    assert not window.is_open


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_loss_of_one_number_may_have_any_shape(shape):
    model, _, window = one_window()
    loss = mean_square(model, regression(4, torch.float64))
    with window:
        window.backward(loss.reshape(shape), targets=torch.tensor([4]).reshape(shape))
        window.backward((loss.detach().reshape(shape) + model[2].bias.sum(), 4))
    assert window.update.targets == 8
    assert window.update.applied


def test_rows_of_the_record_are_those_that_were_told():
    animal = CALM["mlp"]
    model = animal.model()
    accumulator = wb.Accumulator(model, sgd(model.parameters()))
    with accumulator.window() as window:
        window.backward(animal.loss_fn(model, animal.batch(3, torch.float64)), targets=3, rows=3)
        window.backward(animal.loss_fn(model, animal.batch(2, torch.float64)), targets=2, rows=2)
        window.backward(animal.loss_fn(model, animal.batch(4, torch.float64)), targets=0, rows=4)
    assert (window.update.rows, window.update.targets, window.update.micro_batches) == (9, 5, 2)
    with accumulator.window() as window:
        window.backward(animal.loss_fn(model, animal.batch(3, torch.float64)), targets=3)
    assert window.update.rows is None


def test_a_window_that_is_lost_with_its_accumulator_keeps_nobody_company():
    def lose():
        model = torch.nn.Linear(2, 1)
        accumulator = wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
        window = accumulator.window()
        window.backward(model(torch.ones(1, 2)).mean(), targets=1)
        window.backward(model(wb.gather(torch.ones(3, 2))).mean(), targets=1)

    x = torch.ones(2, 3)
    with pytest.raises(wb.MeetingError):
        lose()
    gc.collect()
    assert wb.gather(x) is x
