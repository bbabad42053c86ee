"""``micro_batch="auto"``: the whole batch where it fits, else what fits, within the budget that was given."""

import copy
import gc
import logging
import re

import pytest
import torch
from torch import nn

import wholebatch as wb
from wholebatch.engine import memory
from wholebatch.engine.fit.probe import Probe
from wholebatch.engine.fit.rowsize import row_size


def network(width=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8 * width), nn.Tanh(), nn.Linear(8 * width, 8 * width), nn.Linear(8 * width, 16))


def squares(model, x):
    return model(x).square().mean()


def accumulator_of(model, loss_fn=squares, **options):
    return wb.Accumulator(model, torch.optim.AdamW(model.parameters(), fused=True), loss_fn, check=None, **options)


def resident(model, accumulator):
    (optimizer,) = accumulator._setup.optimizers
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(each.numel() * each.element_size() for each in [*model.parameters(), *states])


def test_a_batch_that_fits_is_taken_as_a_whole():
    accumulator = accumulator_of(network(), memory="1GiB")
    update = accumulator.step(torch.randn(64, 16))
    assert update.micro_batches == 1
    (reason,) = accumulator.reasons
    assert "of the 1 GiB of the budget, so it is not cut" in reason


@pytest.mark.parametrize("budget", ["1700kB", "2MB", "3MB"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_budget_is_kept_and_used(budget, precision, monkeypatch):
    monkeypatch.setattr(
        "wholebatch.engine.fit.fitting.fastest_of", lambda _probe, most, *_: (most, "")
    )  # the clock of a busy machine is no judge
    model = network()
    accumulator = accumulator_of(model, memory=budget, precision=precision)
    rows = torch.randn(1024, 16)
    update = accumulator.step(rows)
    assert 1 < update.micro_batches < 512
    before = resident(model, accumulator)
    with memory.tensor_peak() as peak:
        accumulator.step(rows)
    limit = wb.core.budget.parse_bytes(budget)
    assert 0.8 * limit < before + peak.peak_bytes <= limit


class UpAndDown(nn.Module):
    """A small U-Net."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        block = lambda c, out: nn.Sequential(  # noqa: E731
            nn.Conv2d(c, out, 3, padding=1, bias=False), nn.GroupNorm(4, out), nn.ReLU()
        )
        self.first, self.second, self.middle = block(3, 16), block(16, 32), block(32, 64)
        self.up_two, self.up_one = nn.ConvTranspose2d(64, 32, 2, stride=2), nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.join_two, self.join_one = block(64, 32), block(32, 16)
        self.out = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        one = self.first(x)
        two = self.second(nn.functional.max_pool2d(one, 2))
        middle = self.middle(nn.functional.max_pool2d(two, 2))
        two = self.join_two(torch.cat([self.up_two(middle), two], 1))
        return self.out(self.join_one(torch.cat([self.up_one(two), one], 1)))


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 7, 11])
def test_a_budget_for_a_few_rows_is_kept_where_kernels_take_memory_of_their_own(rows, monkeypatch):
    """One row and two go through other kernels than five do: what they take says nothing of five."""
    monkeypatch.setattr("wholebatch.engine.fit.fitting.fastest_of", lambda _probe, most, *_: (most, ""))
    batch = torch.randn(32, 3, 32, 32)

    def taken(model, accumulator):
        for _ in range(2):
            update = accumulator.step(batch)
        before = resident(model, accumulator)
        with memory.tensor_peak() as peak:
            accumulator.step(batch)
        return before + peak.peak_bytes, update

    model = UpAndDown()
    exact, _ = taken(model, accumulator_of(model, micro_batch=wb.Rows(rows)))
    model, budget = UpAndDown(), round(1.02 * exact)
    most, update = taken(model, accumulator_of(model, memory=budget))
    assert 0.5 * budget < most <= budget
    assert update.retries == 0


def test_the_look_ahead_keeps_to_the_budget_as_well():
    model = network()
    accumulator = accumulator_of(model, memory="1500kB")
    before = sum(each.numel() * 4 for each in model.parameters())
    with memory.tensor_peak() as peak:
        accumulator.step(torch.randn(512, 16))
    assert before + peak.peak_bytes <= 1_500_000 + 20_000


def test_planning_changes_no_update():
    """Dropout masks, buffers and weights are those of a run that was told the micro-batch."""
    rows = torch.randn(512, 16)

    def run(**options):
        model = nn.Sequential(network(), nn.Dropout(0.5), nn.BatchNorm1d(16))
        torch.manual_seed(5)
        accumulator = accumulator_of(model, batch_norm="per_micro_batch", **options)
        updates = [accumulator.step(rows) for _ in range(2)]
        return copy.deepcopy(model.state_dict()), updates

    planned, updates = run(memory="1600kB")
    at_once = -(-512 // updates[0].micro_batches)
    assert updates[0].micro_batches > 1
    told, _ = run(micro_batch=wb.Rows(at_once))
    assert all(torch.equal(planned[name], told[name]) for name in planned)


def test_a_budget_that_holds_no_row_is_an_error_before_anything_is_trained():
    model = network()
    before = copy.deepcopy(model.state_dict())
    accumulator = accumulator_of(model, memory="1200kB")
    with pytest.raises(wb.OutOfMemoryError, match="does not hold one row: training takes") as error:
        accumulator.step(torch.randn(64, 16))
    assert isinstance(error.value, MemoryError)
    assert "weights, gradients and optimizer" in str(error.value)
    assert "checkpoint_blocks" in error.value.hint
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert accumulator.open_window is None


def test_the_budget_that_is_asked_for_is_enough():
    """A share of a budget stays free, so that what training takes is less than what is needed for it."""
    batch = torch.randn(64, 16)
    with pytest.raises(wb.OutOfMemoryError) as error:
        accumulator_of(network(), memory="1200kB").step(batch)
    enough = re.search(r"give ([0-9.,]+ [KM]iB) or more", error.value.hint)[1]
    assert accumulator_of(network(), memory=enough).step(batch).applied


def test_activations_of_one_row_may_be_too_much():
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    accumulator = accumulator_of(model, memory="100kB")
    with pytest.raises(wb.OutOfMemoryError, match=r"does not hold one row: training takes [0-9.]+ KiB"):
        accumulator.step(torch.randn(2, 5000, 4))
    accumulator = accumulator_of(
        model, lambda model, x: model(x).square().sum() / x.numel() * x.sum().item(), memory="1kB"
    )
    with pytest.raises(wb.OutOfMemoryError, match="does not hold one row"):
        accumulator.step(torch.randn(2, 5000, 4))


def test_what_is_too_much_in_parts_may_fit_as_a_whole():
    """The second micro-batch of a window meets the gradient of the first; a single one does not."""
    model = network()
    accumulator = accumulator_of(model, memory="1460kB")
    assert accumulator.step(torch.randn(32, 16)).micro_batches == 1


def test_the_budget_holds_exactly_one_row():
    model = nn.Linear(4, 4)
    plan = wb.plan(
        model, torch.optim.AdamW(model.parameters()), squares, torch.randn(2, 500, 4), 8, "1GiB", timed=False
    )
    accumulator = accumulator_of(model, memory=int(1.02 * plan.peak_at(1)))
    assert accumulator.step(torch.randn(8, 500, 4)).micro_batches == 8


@pytest.mark.parametrize("said", ["8 GB of RAM", "lots", 0, -1, 1.5])
def test_a_budget_that_is_no_size_is_refused_at_once(said):
    with pytest.raises(wb.ConfigError, match="memory="):
        accumulator_of(network(), memory=said)


def test_long_rows_are_cut_finer_than_short_ones(monkeypatch):
    monkeypatch.setattr("wholebatch.engine.fit.fitting.fastest_of", lambda _probe, most, *_: (most, ""))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))
    pad = lambda rows: nn.utils.rnn.pad_sequence(rows, batch_first=True)  # noqa: E731
    accumulator = accumulator_of(model, memory="400kB", collate=pad)
    long, short = [torch.randn(40, 8)] * 32, [torch.randn(4, 8)] * 32
    first, second = accumulator.step(long), accumulator.step(short)
    assert first.micro_batches > 2 * second.micro_batches
    planned = len(accumulator.reasons)
    assert accumulator.step(long).micro_batches == first.micro_batches
    assert accumulator.step(short).micro_batches == second.micro_batches
    assert len(accumulator.reasons) == planned  # both kinds are known
    longer = accumulator.step([torch.randn(44, 8), *short])  # of the kind of the long ones, and longer than they were
    assert longer.micro_batches > second.micro_batches


def test_shapes_of_tensors_are_kinds_of_their_own():
    torch.manual_seed(0)
    accumulator = accumulator_of(nn.Linear(8, 8), memory="60kB")
    wide, narrow = accumulator.step(torch.randn(32, 40, 8)), accumulator.step(torch.randn(32, 2, 8))
    assert wide.micro_batches > narrow.micro_batches


def test_a_larger_batch_than_the_one_that_fitted_is_planned_anew():
    accumulator = accumulator_of(network(), memory="1500kB")
    assert accumulator.step(torch.randn(16, 16)).micro_batches == 1
    assert accumulator.step(torch.randn(12, 16)).micro_batches == 1
    assert accumulator.step(torch.randn(512, 16)).micro_batches > 1
    assert len(accumulator.reasons) == 2


class Neighbour:
    """Takes memory away: as long as it is there, no more than some rows pass."""

    def __init__(self, rows):
        self.rows = rows

    def __call__(self, model, x):
        if self.rows is not None and len(x) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return squares(model, x)


def sizes(accumulator, windows, rows=64):
    batch = torch.randn(rows, 16)
    made = [accumulator.step(batch) for _ in range(windows)]
    return [-(-rows // update.micro_batches) for update in made], sum(update.retries for update in made)


def test_it_grows_again_when_a_shortage_has_passed():
    neighbour = Neighbour(None)
    accumulator = accumulator_of(network(), neighbour, memory="1GiB")
    assert sizes(accumulator, 2) == ([64, 64], 0)
    neighbour.rows = 16
    assert sizes(accumulator, 2) == ([16, 16], 2)
    neighbour.rows = None
    seen, retries = sizes(accumulator, 20)
    assert retries == 0
    assert seen == [16] * 6 + [32] * 9 + [64] * 5
    assert sum("without a shortage" in reason for reason in accumulator.reasons) == 2


def test_it_never_swings_for_good():
    """Under a neighbour that stays, each size is tried twice in all, and then no more."""
    neighbour = Neighbour(None)
    accumulator = accumulator_of(network(), neighbour, memory="1GiB")
    accumulator.step(torch.randn(64, 16))
    neighbour.rows = 16
    _, early = sizes(accumulator, 30)
    assert early == 3  # 64 and 32 once, and 32 once more
    assert sizes(accumulator, 60) == ([16] * 60, 0)


def test_running_out_under_auto_keeps_the_update():
    clean_model = network()
    clean = accumulator_of(clean_model, micro_batch=wb.Rows(16))
    model = network()
    accumulator = accumulator_of(model, Neighbour(16), memory="1GiB")
    rows = torch.randn(64, 16)
    assert accumulator.step(rows).retries >= 1
    assert accumulator.step(rows).micro_batches == 4
    for _ in range(2):
        clean.step(rows)
    for one, other in zip(clean_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_where_a_few_rows_cannot_be_run_the_whole_batch_is_tried():
    model = network()

    def whole_only(model, x):
        if len(x) < 64:
            raise ValueError("needs all rows")
        return squares(model, x)

    accumulator = accumulator_of(model, whole_only, memory="1GiB")
    update = accumulator.step(torch.randn(64, 16))
    assert (update.micro_batches, update.retries) == (1, 0)
    (reason,) = accumulator.reasons
    assert "could not be run to plan it (ValueError: needs all rows)" in reason


def test_without_a_budget_one_row_that_seems_too_much_is_still_tried(monkeypatch):
    monkeypatch.setattr("wholebatch.engine.fit.fitting.available_bytes", lambda _: 1000)
    accumulator = accumulator_of(network())
    assert accumulator.step(torch.randn(6, 16)).micro_batches == 6
    assert any("it is tried row by row" in reason for reason in accumulator.reasons)


@pytest.mark.parametrize(("memory", "said"), [("1GiB", "within the 1 GiB"), ("1200kB", "more than the 1.14 MiB")])
@pytest.mark.parametrize("micro_batch", [wb.Rows(32), wb.Tokens(512, length=len)], ids=str)
def test_a_cut_that_was_asked_for_is_held_against_the_budget(micro_batch, memory, said, caplog):
    accumulator = accumulator_of(network(), micro_batch=micro_batch, memory=memory)
    with caplog.at_level(logging.INFO, "wholebatch"):
        for _ in range(2):
            assert accumulator.step(torch.randn(64, 16)).micro_batches in (2, 4)
    (reason,) = accumulator.reasons
    assert said in reason
    assert (caplog.records[0].levelno == logging.WARNING) == ("more" in said)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_what_recurrent_kernels_take_for_themselves_is_kept_within_the_budget(kind):
    """No operation tells of it: twice what its tensors take."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.head = kind(16, 32, 2, batch_first=True), nn.Linear(32, 8)

        def forward(self, x):
            return self.head(self.layers(x)[0])

    for budget in (280_000, 360_000, 600_000, 1_200_000, 2_400_000):
        torch.manual_seed(0)
        model = Recurrent()
        accumulator = accumulator_of(model, memory=budget)
        rows = torch.randn(64, 20, 16)
        try:
            accumulator.step(rows)
        except wb.OutOfMemoryError:  # the operations themselves pass the budget, or what their kernels take does
            assert budget < 600_000
            continue
        before = resident(model, accumulator)
        with memory.tensor_peak() as peak:
            accumulator.step(rows)
        assert before + peak.peak_bytes <= budget


def test_kernels_are_measured_near_what_will_be_run_and_near_the_first_look_at_its_rows(monkeypatch):
    """They are made ready for a number of rows when they first meet it, so the rows of the first look cost less."""
    measured, measure = [], Probe.measure
    monkeypatch.setattr(Probe, "measure", lambda self, rows, row: measured.append(rows) or measure(self, rows, row))
    torch.manual_seed(0)
    model = nn.LSTM(16, 32, batch_first=True)
    loss_fn = lambda model, x: model(x)[0].square().mean()  # noqa: E731
    plan = wb.plan(model, torch.optim.SGD(model.parameters()), loss_fn, torch.randn(4, 20, 16), 96, timed=False)
    looked = []
    for rows in (20, 28, 40, 60):  # what kernels take, and so how far below is looked, depends on PyTorch
        measured.clear()
        accumulator_of(model, loss_fn, memory=round(1.02 * plan.peak_at(rows))).step(torch.randn(96, 20, 16))
        ((least, most),) = measured
        assert 10 <= most <= 20 if least == 5 else most == 2 * least > 20
        assert rows / 3 < most < rows
        looked.append(least)
    assert looked[0] == 5 < looked[-1]


def test_the_size_of_a_row_is_told_from_the_row():
    row = {"a": torch.ones(2, 3), "b": [b"abc", ("de", 1)], "c": range(4), "d": None}
    assert row_size(row) == 6 + 3 + 2 + 1 + 4 + 1
    assert row_size(torch.ones(3).numpy()) == 3


def test_planning_holds_on_to_nothing():
    model = network()
    accumulator = accumulator_of(model, memory="3MB")
    rows = torch.randn(64, 16)
    accumulator.step(rows)
    gc.collect()
    with memory.tensor_peak() as peak:
        accumulator.step(rows)
    assert peak.left_bytes < 20_000
    assert all(each.grad is None for each in model.parameters())


def test_looking_ahead_costs_less_than_two_windows():
    """Counted in rows that pass through the model, which no other process can disturb."""
    seen = []

    def loss_fn(model, x):
        seen.append(len(x))
        return squares(model, x)

    accumulator = accumulator_of(network(), loss_fn, memory="1500kB")
    update = accumulator.step(torch.randn(256, 16))
    assert update.micro_batches > 1
    assert sum(seen) < 3 * 256


@pytest.mark.parametrize("budget", ["20MB", None])
def test_a_batch_that_fits_by_far_costs_a_pass_of_five_rows(budget):
    seen = []

    def loss_fn(model, x):
        seen.append(len(x))
        return squares(model, x)

    accumulator = accumulator_of(network(), loss_fn, memory=budget)
    assert accumulator.step(torch.randn(256, 16)).micro_batches == 1
    assert seen == [5, 256]


def with_square_of_weights(model, x):
    """A product that takes more than a few rows do, and does not grow with them."""
    return squares(model, x) + 0.01 * torch.relu(model[2].weight[:, :123].T @ model[2].weight[:, :121]).square().mean()


@pytest.mark.parametrize(("loss_fn", "looks"), [(squares, [5]), (with_square_of_weights, [5, 10])])
def test_twice_the_rows_are_looked_at_only_where_it_is_open_what_grows_with_them(loss_fn, looks, monkeypatch):
    monkeypatch.setattr("wholebatch.engine.fit.fitting.fastest_of", lambda _probe, most, *_: (most, ""))
    seen = []

    def watched(model, x):
        seen.append(len(x))
        return loss_fn(model, x)

    model = network()
    accumulator = accumulator_of(model, watched, memory="2200kB")
    update = accumulator.step(torch.randn(1024, 16))
    assert update.micro_batches > 1
    assert seen[: -update.micro_batches] == looks
    before = resident(model, accumulator)
    with memory.tensor_peak() as peak:
        accumulator.step(torch.randn(1024, 16))
    assert 0.8 * 2_200_000 < before + peak.peak_bytes <= 2_200_000


def normed():
    return wb.exact_batch_norm(nn.Sequential(nn.Linear(16, 256), nn.BatchNorm1d(256), nn.Tanh(), nn.Linear(256, 16)))


def test_exact_batch_norm_is_not_cut_for_a_budget_that_no_cut_can_keep(monkeypatch):
    model = normed()
    before = copy.deepcopy(model.state_dict())
    accumulator = accumulator_of(model, memory="2MiB")
    with pytest.raises(wb.OutOfMemoryError, match=r"Batch norm is exact in 1, .* however it is cut") as error:
        accumulator.step(torch.randn(2048, 16))
    assert "convert_batch_norm" in error.value.hint
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    monkeypatch.setattr("wholebatch.engine.fit.fitting.available_bytes", lambda _device: 2 << 20)
    accumulator = accumulator_of(model)
    assert accumulator.step(torch.randn(2048, 16)).micro_batches == 1
    assert "are free by a careful count" in accumulator.reasons[0]


def test_exact_batch_norm_within_its_budget_is_taken_as_a_whole():
    assert accumulator_of(normed(), memory="1GiB").step(torch.randn(64, 16)).micro_batches == 1


def test_kernels_are_not_measured_where_the_budget_is_far_away(monkeypatch):
    def forbidden(*_):
        raise AssertionError

    monkeypatch.setattr("wholebatch.engine.fit.probe.Probe.measure", forbidden)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    accumulator = accumulator_of(model, memory="1GiB")
    assert accumulator.step(torch.randn(32, 1, 8, 8)).micro_batches == 1


def test_whether_a_cut_fits_may_stay_unknown():
    def loss_fn(model, x):
        if len(x) < 32:
            raise ValueError("needs more rows")
        return squares(model, x)

    accumulator = accumulator_of(network(), loss_fn, micro_batch=wb.Rows(32), memory="1GiB")
    assert accumulator.step(torch.randn(64, 16)).micro_batches == 2
    assert accumulator.reasons == ["Whether the micro-batch fits was not found out: ValueError."]
