"""A loader's micro-batch that does not fit is taken back by itself, split, and tried again: the same update."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import wholebatch as wb
from properties import fingerprint, state_of
from shortages import MODELS, ROWS, SAID, Fault, batch, phases_of, prepared
from wholebatch.engine import memory
from wholebatch.engine.retraction import Retraction
from wholebatch.engine.window import Window


def out():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(memory, "free_cached", lambda _device: None)


def parts_of(sizes):
    whole, start, made = batch(), 0, []
    for size in sizes:
        made.append({name: each[start : start + size] for name, each in whole.items()})
        start += size
    return made


def numbers(accumulator):
    setup = accumulator._setup
    state = [
        value
        for each in setup.optimizers
        for parameter in each.state
        for value in each.state[parameter].values()
        if value is not None
    ]
    return [each.detach().clone() for each in [*setup.model.parameters(), *setup.model.buffers(), *state]]


def loaded(make, fault, windows):
    """Train on windows of micro-batches of such sizes, by `updates`."""
    accumulator, _ = prepared(make, fault, rows=4, adaptive=False)
    made = [update for sizes in windows for update in accumulator.updates(parts_of(sizes), micro_batches=len(sizes))]
    return numbers(accumulator), torch.get_rng_state(), made


def assert_close(found, right):
    """Rounding apart, since one part of a gradient may come from the whole micro-batch and another from its halves."""
    for one, other in zip(found[0], right[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    assert torch.equal(found[1], right[1])


COARSE = [4, 4, 4]


def finer_from(at):
    return [4] * at + [2] * (2 * (3 - at))


@pytest.mark.parametrize("name", MODELS)
def test_a_shortage_anywhere_leaves_the_run_whose_loader_made_smaller_micro_batches(name):
    make = MODELS[name]
    joined = name == "exact"  # its micro-batches meet, so they are all there to be made again
    fine, cleans = [2] * 6, {}
    reached = Fault()
    loaded(make, reached, [COARSE, COARSE])
    raised = 0
    for phase in phases_of(make()):
        times = reached.seen[phase] + 1
        for at in range(times):
            window, place = divmod(at, times // 2)
            windows = [COARSE] * window + [fine if joined else finer_from(place)] + [fine] * (1 - window)
            key = str(windows)
            if key not in cleans:
                cleans[key] = loaded(make, Fault(), windows)
            fault = Fault(phase, at)
            found = loaded(make, fault, [COARSE, COARSE])
            assert fault.raised
            assert_close(found, cleans[key])
            assert [update.retries for update in found[2]] == [1 - window, window], (phase, at)
            assert [update.rows for update in found[2]] == [ROWS] * 2
            assert [update.micro_batches for update in found[2]] == [len(each) for each in windows]
            raised += 1
    assert raised >= 6 * 2 * 2 or joined


@pytest.mark.parametrize("name", ["dense", "recurrent"])
def test_the_comparison_sees_a_gradient_that_counts_twice(name, monkeypatch):
    """Beside the test above: a second attempt that leaves what has arrived."""
    monkeypatch.setattr(Retraction, "subtract", lambda *_: None)
    make = MODELS[name]
    phase = phases_of(make())[-1]
    found = loaded(make, Fault(phase, 1), [COARSE])
    with pytest.raises(AssertionError):
        assert_close(found, loaded(make, Fault(), [finer_from(1)]))


@pytest.mark.parametrize("name", MODELS)
def test_two_shortages_in_one_micro_batch(name):
    """A half that does not fit either is split as well."""
    make = MODELS[name]
    late = phases_of(make())[3]

    class Small(Fault):
        def reach(self, phase):
            if phase == late and self.left > 0:
                self.left -= 1
                raise RuntimeError(SAID)

        left = 2

    found = loaded(make, Small(), [[8, 4]])
    right = loaded(make, Fault(), [[2] * 6 if name == "exact" else [2, 2, 4, 2, 2]])
    assert found[2][0].retries == 2
    assert_close(found, right)


def linear(dtype=torch.float32, width=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).to(dtype)


def squares(model, x):
    return model(x).square().mean()


def accumulator_of(model, loss_fn=squares, **options):
    return wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, check=None, **options)


@pytest.mark.parametrize("accumulate_in", ["fp32", "compensated", "weights"])
def test_sums_of_their_own_are_taken_back_too(accumulate_in):
    """16-bit weights: what is summed apart counts once, wherever the backward pass of the second stops."""
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randn(4, 3, generator=draw).bfloat16() for _ in range(3)]
    for at in range(4, 8):
        seen = [0]
        model = linear(torch.bfloat16)

        def hook(_, seen=seen, at=at):
            seen[0] += 1
            if seen[0] == at + 1:
                raise out()

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(hook)
        plain = linear(torch.bfloat16)
        found = list(accumulator_of(model, accumulate_in=accumulate_in).updates(rows, micro_batches=3))
        finer = [rows[0], *rows[1].split(2), *rows[2].split(2)]
        list(accumulator_of(plain, accumulate_in=accumulate_in).updates(finer, micro_batches=5))
        assert found[0].retries == 1
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)


def test_sparse_gradients_count_once():
    rows = [torch.tensor([[0, 1], [2, 2]]), torch.tensor([[1, 1], [3, 0]]), torch.tensor([[2, 0], [0, 0]])]

    def run(parts, at):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2)).double()
        seen = [0]

        def hook(_):
            seen[0] += 1
            if seen[0] == at:
                raise out()

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(hook)
        list(accumulator_of(model).updates(parts, micro_batches=len(parts)))
        return list(model.parameters())

    right = run([rows[0], *rows[1].split(1), *rows[2].split(1)], None)
    for at in (4, 5, 6):
        for one, other in zip(run(rows, at), right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def short_above(rows, times=10**9):
    """A loss for which no more rows than some fit, so many times."""
    left = [times]

    def loss_fn(model, x):
        if len(x) > rows and left[0] > 0:
            left[0] -= 1
            raise out()
        return squares(model, x)

    return loss_fn


def test_what_does_not_fit_is_not_tried_again_and_grows_when_it_may(caplog):
    loss_fn = short_above(2, times=2)
    accumulator = accumulator_of(linear(), loss_fn)
    rows = [torch.randn(8, 3) for _ in range(80)]
    made = list(accumulator.updates(rows, micro_batches=2))
    assert [update.retries for update in made[:2]] == [2, 0]
    assert [update.micro_batches for update in made[1:8]] == [8] * 7
    assert made[-1].micro_batches == 2
    assert all(update.rows == 16 for update in made)
    assert "Memory ran out with 8 rows at once" in accumulator.reasons[0]
    assert any("tried again" in reason for reason in accumulator.reasons)


def test_the_same_where_each_window_is_one_micro_batch():
    model, plain = linear(), linear()
    rows = [torch.randn(8, 3) for _ in range(4)]
    made = list(accumulator_of(model, short_above(3)).updates(rows, micro_batches=1))
    assert [update.retries for update in made] == [2, 0, 0, 0]
    assert [update.micro_batches for update in made] == [4] * 4
    fine = accumulator_of(plain, micro_batch=wb.Rows(2))
    for each in rows:
        fine.step(each)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_optimizers_that_take_gradients_in_are_made_again_from_the_start(micro_batches):
    model, plain = linear(), linear()
    rows = [torch.randn(8, 3) for _ in range(2 * micro_batches)]

    def made_of(model, loss_fn, **options):
        return wb.Accumulator(model, wb.AdamA(model.parameters(), lr=0.1), loss_fn, check=None, **options)

    made = list(made_of(model, short_above(4)).updates(rows, micro_batches=micro_batches))
    assert [update.retries for update in made] == [1, 0]
    fine = made_of(plain, squares, micro_batch=wb.Rows(4))
    for window in (rows[:micro_batches], rows[micro_batches:]):
        fine.step(torch.cat(window))
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_no_micro_batch_outlives_its_pass():
    alive = []

    def loader():
        for _ in range(6):
            rows = torch.randn(8, 3)
            alive.append(weakref.ref(rows))
            yield rows
            del rows
            gc.collect()
            assert [each() is None for each in alive[:-1]] == [True] * (len(alive) - 1)

    made = list(accumulator_of(linear(), short_above(4, times=3)).updates(loader(), micro_batches=3))
    assert sum(update.retries for update in made) >= 1


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_row_that_does_not_fit_is_an_error_that_leaves_no_trace(micro_batches):
    model = linear()
    accumulator = accumulator_of(model, short_above(0))
    before = state_of(model)
    with pytest.raises(wb.OutOfMemoryError, match="in a micro-batch of one row, and no cut is finer: CUDA out of"):
        list(accumulator.updates([torch.ones(4, 3)] * 2, micro_batches=micro_batches))
    assert state_of(model) == before
    assert accumulator.open_window is None


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_what_cannot_be_cut_is_an_error_that_says_why(micro_batches):
    model = nn.Sequential(linear(), nn.BatchNorm1d(2))
    accumulator = accumulator_of(model, short_above(4))
    rows = [torch.randn(8, 3), torch.randn(4, 3)][: 3 - micro_batches]
    if micro_batches == 1:
        with pytest.raises(wb.OutOfMemoryError, match=r"cannot be cut finer .CUDA out of memory"):
            list(accumulator.updates(rows, micro_batches=1))
    accumulator = accumulator_of(
        linear(), lambda model, x: short_above(4)(model, x["a"]), targets=lambda x: len(x["a"])
    )
    micro_batch = {"a": torch.randn(8, 3), "b": torch.ones(3)}
    before = state_of(accumulator._setup.model)
    with pytest.raises(wb.OutOfMemoryError, match=r"disagree on how many rows there are: a 8, b 3"):
        list(accumulator.updates([micro_batch], micro_batches=micro_batches))
    assert state_of(accumulator._setup.model) == before


def test_other_errors_end_the_window():
    def loss_fn(model, x):
        raise ValueError("a mistake")

    accumulator = accumulator_of(linear(), loss_fn)
    with pytest.raises(ValueError, match="a mistake"):
        list(accumulator.updates([torch.ones(2, 3)] * 2, micro_batches=2))
    assert accumulator.open_window is None


def test_memory_that_runs_out_under_the_first_check_is_looked_for_later():
    seen = []

    def loss_fn(model, x):
        seen.append(len(x))
        if len(seen) == 1:
            raise out()
        return squares(model, x)

    model = linear()
    accumulator = wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn)
    (update,) = accumulator.updates([torch.randn(4, 3)] * 2, micro_batches=2)
    assert update.retries == 0
    assert any("compared" in reason or "agree" in reason for reason in accumulator.reasons)


class ShortSteps(torch.optim.SGD):
    times = 1

    def step(self, closure=None):
        if self.times:
            self.times -= 1
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1.0)
            raise out()
        return super().step()


def by_loader(accumulator):
    return next(iter(accumulator.updates([torch.ones(2, 3)] * 2, micro_batches=2)))


def by_window(accumulator):
    window = accumulator.window()
    for _ in range(2):
        window.backward(squares(accumulator._setup.model, torch.ones(2, 3)), targets=2)
    return window.close()


@pytest.mark.parametrize("way", [by_loader, by_window])
def test_a_step_that_ran_out_is_undone_and_made_again(way):
    plain, model = linear(), linear()
    way(accumulator_of(plain))
    optimizer = ShortSteps(model.parameters(), lr=0.1)
    accumulator = wb.Accumulator(model, optimizer, squares, check=None)
    assert way(accumulator).applied
    assert fingerprint(list(model.parameters())) == fingerprint(list(plain.parameters()))
    optimizer.times = 2
    before = state_of(model, optimizer)
    with pytest.raises(wb.OutOfMemoryError, match=r"at the end of a window .CUDA out of memory") as error:
        way(accumulator)
    assert "smaller micro-batches" in error.value.hint
    assert state_of(model, optimizer) == before
    assert accumulator.open_window is None


def test_a_window_of_ones_own_is_rolled_back_with_an_error_that_says_so():
    model = linear()
    model[2].weight.register_post_accumulate_grad_hook(short_at(2))
    accumulator = accumulator_of(model)
    before = state_of(model)
    window = accumulator.window()
    window.backward(squares(model, torch.ones(2, 3)), targets=2)
    with pytest.raises(wb.OutOfMemoryError, match="in the backward pass of micro-batch 2 of a window") as error:
        window.backward(squares(model, torch.ones(2, 3)), targets=2)
    assert isinstance(error.value, MemoryError)
    assert not window.is_open
    assert state_of(model) == before
    assert isinstance(accumulator.window(), Window)


def short_at(time):
    return short_when([time])


def short_when(left):
    """Runs out of memory when what is left has been counted down to 0."""

    def hook(_):
        left[0] -= 1
        if left[0] == 0:
            raise out()

    return hook


def three_windows(draws):
    """Train three windows of four micro-batches, drawing random numbers and writing buffers or not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6, momentum=0.5), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    model.train(draws)
    accumulator = accumulator_of(model, batch_norm="per_micro_batch")
    list(accumulator.updates([torch.ones(4, 3, dtype=torch.float64)] * 12, micro_batches=4))


@pytest.mark.parametrize("draws", [True, False])
def test_what_stands_still_needs_no_mark_and_what_moves_is_put_back(draws, monkeypatch):
    """Random state and buffers are marked inside a window only where they have moved from one to the next."""
    from wholebatch.engine.transaction import _Kept

    taken = []
    take = _Kept.take
    monkeypatch.setattr(_Kept, "take", lambda self, *given: (taken.append(self), take(self, *given))[1])
    three_windows(draws)
    marks = len(taken) - 3  # each window keeps both when it begins
    assert marks == (9 if draws else 3)


def test_python_and_numpy_draws_are_put_back_too():
    import random

    import numpy as np

    def run(parts, at):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(0)
        model, seen = linear(torch.float64), [0]

        def loss_fn(model, x):
            seen[0] += 1
            loss = model(x).square().mean() * random.random() * np.random.rand()
            if seen[0] == at:
                raise out()
            return loss

        list(accumulator_of(model, loss_fn).updates(parts, micro_batches=len(parts)))
        return list(model.parameters()), random.random(), np.random.rand()

    rows = [torch.ones(4, 3, dtype=torch.float64) * i for i in range(1, 4)]
    found, right = run(rows, 2), run([rows[0], *rows[1].split(2), *rows[2].split(2)], None)
    for one, other in zip(found[0], right[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert found[1:] == right[1:]


def test_a_micro_batch_that_cannot_be_taken_back_ends_the_window(monkeypatch):
    """Memory runs out in its backward pass, and again in the pass that would subtract what it brought."""
    model = linear()
    times = [0]

    def hook(_):
        times[0] += 1
        if times[0] in (7, 8):  # the second micro-batch's third gradient, and then its first one again
            raise out()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    accumulator = accumulator_of(model)
    rows = [torch.randn(4, 3) for _ in range(2)]
    before = state_of(model)
    with pytest.raises(wb.OutOfMemoryError, match="again when that was taken back"):
        list(accumulator.updates(rows, micro_batches=2))
    assert state_of(model) == before


@pytest.mark.parametrize("phase", ["forward", "backward of first.weight"])
def test_a_window_that_goes_on_in_another_process_takes_its_first_micro_batch_back_too(phase):
    """Back to where that process took over, not to where the window began in the one before."""
    first, second = parts_of([4, 4])

    def run(fault, goes_on):
        accumulator, _ = prepared(MODELS["dense"], fault if not goes_on else Fault(), rows=4, adaptive=False)
        accumulator.add(first)
        if goes_on:
            state = copy.deepcopy(accumulator.state_dict())
            accumulator.open_window.rollback()
            accumulator, _ = prepared(MODELS["dense"], fault, rows=4, adaptive=False)
            accumulator.load_state_dict(state)
            accumulator.window()
        window = accumulator.add(second)
        assert fault.raised
        return numbers(accumulator), torch.get_rng_state(), window.close()

    right, found = run(Fault(phase, 1), goes_on=False), run(Fault(phase, 0), goes_on=True)
    assert found[2].rows == right[2].rows == 8
    assert fingerprint(found[:2]) == fingerprint(right[:2])


def test_a_pass_of_the_users_own_after_one_that_could_be_taken_back_ends_the_window():
    """`Window.backward` has nobody who would take a micro-batch back and try again."""
    first, second = parts_of([4, 4])
    fault = Fault("backward of first.weight", 1)
    accumulator, left = prepared(MODELS["dense"], fault, rows=4)
    before = left()
    window = accumulator.add(first)
    loss = nn.functional.cross_entropy(accumulator._setup.model(second["x"]), second["y"], reduction="sum")
    with pytest.raises(wb.OutOfMemoryError, match="the window was rolled back"):
        window.backward((loss, 4))
    assert not window.is_open
    assert left() == before


@pytest.mark.parametrize("error", [out(), ValueError("a bad row")], ids=["memory", "other"])
def test_no_window_stays_open_that_holds_a_part_of_a_micro_batch(error):
    """Who catches what `add` raises, and goes on, has all rows of a micro-batch in the window or none."""
    model = linear()

    def loss_fn(model, x):
        loss = model(x).square().mean()
        if len(x) == 4:
            raise out()
        if bool((x == 7).any()):  # in the second half
            raise error
        return loss

    accumulator = accumulator_of(model, loss_fn)
    before = state_of(model)
    accumulator.add(torch.ones(2, 3))
    with pytest.raises((wb.OutOfMemoryError, ValueError)):
        accumulator.add(torch.tensor([[1.0] * 3] * 3 + [[7.0] * 3]))
    assert accumulator.open_window is None
    assert state_of(model) == before


@pytest.mark.parametrize("moves", ["draws", "writes"])
def test_what_begins_to_move_in_the_window_that_runs_short_is_never_half_taken_back(moves):
    """Nothing moved from one window to the next, so nothing was marked; then the model changes its mode."""
    torch.manual_seed(0)
    layer = nn.Dropout(0.5) if moves == "draws" else nn.BatchNorm1d(6)
    model = nn.Sequential(nn.Linear(3, 6), layer, nn.Linear(6, 2)).double().eval()
    left = [0]
    model[0].weight.register_post_accumulate_grad_hook(short_when(left))
    accumulator = accumulator_of(model, batch_norm="per_micro_batch")
    rows = [torch.randn(4, 3, dtype=torch.float64) for _ in range(3)]
    for _ in range(2):
        list(accumulator.updates(rows, micro_batches=3))
    model.train()
    left[0] = 2
    before = state_of(model)
    with pytest.raises(wb.OutOfMemoryError, match="did not in the window before"):
        list(accumulator.updates(rows, micro_batches=3))
    assert state_of(model) == before
    left[0] = 2
    (update,) = accumulator.updates(rows, micro_batches=3)  # now it is marked
    assert update.retries == 1


@pytest.mark.parametrize("others", [0, 1, 2])
@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_micro_batch_is_taken_back_while_another_window_is_open(others, place):
    """What its window had come to lies aside where the other one had its turn in between."""

    def run(others, short):
        torch.manual_seed(0)
        model, other = linear(torch.float64), linear(torch.float64)
        left = [0]
        if place == "forward":
            model.register_forward_hook(lambda *_: short_when(left)(None))
        else:
            model[0].weight.register_post_accumulate_grad_hook(short_when(left))
        mine, others_own = accumulator_of(model), accumulator_of(other)
        rows = [torch.randn(4, 3, dtype=torch.float64) for _ in range(4)]
        mine.add(rows[0])
        for micro_batch in rows[1 : 1 + others]:
            others_own.add(micro_batch)
        left[0] = short
        window = mine.add(rows[3])
        assert (left[0] < -1) == bool(short)  # it was run again, in parts
        window.close()
        return list(model.parameters())

    for one, right in zip(run(others, 1), run(others, 0), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-12, atol=1e-14)
