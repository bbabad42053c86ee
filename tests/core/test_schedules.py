"""How large is the next logical batch, and what becomes of the learning rate?"""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import wholebatch as wb
from wholebatch.core.schedules import ByNoise, Change, Fixed, Geometric, Linear, Rates, Stepped, ema_decay, rescaled

SIZES = st.integers(1, 4096)


def update(number, size, noise_scale, **options):
    known = {"loss": 1.0, "targets": 10 * size, "rows": size, "micro_batches": 4, "lr": 0.1, **options}
    return wb.Update(number=number, noise_scale=noise_scale, **known)


def test_steps_are_counted_by_update_or_by_epoch():
    assert [Stepped(4, {2: 8, 5: 2}).at(done) for done in range(7)] == [4, 4, 8, 8, 8, 2, 2]
    by_epoch = Stepped(4, {2: 8}, by="epoch")
    assert [by_epoch.at(1000, epoch) for epoch in range(4)] == [4, 4, 8, 8]
    by_epoch.set_epoch(3)
    assert by_epoch.at(0) == 8


@given(
    kind=st.sampled_from([Linear, Geometric]),
    first=SIZES,
    last=SIZES,
    over=st.integers(1, 50),
    multiple=st.integers(1, 64),
)
def test_growth_goes_from_one_end_to_the_other_and_never_back(kind, first, last, over, multiple):
    schedule = kind(first, last, over=over, multiple=multiple)
    sizes = [schedule.at(done) for done in range(over + 3)]
    assert sizes[0] == first
    assert sizes[over:] == [last] * 3
    assert sizes == sorted(sizes, reverse=last < first)
    assert all(size % multiple == 0 for size in sizes if size not in (first, last))


def test_growth_is_by_equal_steps_or_by_equal_factors():
    assert [Linear(10, 50, over=4).at(done) for done in range(5)] == [10, 20, 30, 40, 50]
    assert [Geometric(10, 160, over=4).at(done) for done in range(5)] == [10, 20, 40, 80, 160]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fixed(0),
        lambda: Fixed(2.5),
        lambda: Fixed("64"),
        lambda: Fixed(True),
        lambda: Stepped(4, {0: 8}),
        lambda: Stepped(4, {3: -8}),
        lambda: Stepped(4, [3, 8]),
        lambda: Stepped(4, {3: 8}, by="step"),
        lambda: Linear(4, 8, over=0),
        lambda: Geometric(4, 8, over=2, multiple=0),
        lambda: ByNoise(8, 4),
        lambda: ByNoise(4, 8, share=1.0),
        lambda: ByNoise(4, 8, share=0),
        lambda: ByNoise(4, 8, smoothing=1.0),
        lambda: ByNoise(4, 8, step=1),
        lambda: ByNoise(4, 8, step="double"),
        lambda: ByNoise(4, 8, every=0),
    ],
)
def test_what_is_no_schedule_gets_a_sentence_and_a_hint(make):
    with pytest.raises(wb.ConfigError, match="hint: "):
        make()


def test_a_schedule_says_what_it_does():
    assert [
        str(each) for each in (Fixed(8), Stepped(4, {100: 8}), Linear(4, 8, over=1, by="epoch"), ByNoise(4, 8))
    ] == [
        "8",
        "4, 8 after update 100",
        "4 to 8 in equal steps over 1 epoch",
        "4 to 8, as long as no more than 50% is wasted",
    ]
    assert str(Geometric(4, 8, over=30)) == "4 to 8 by equal factors over 30 updates"


def run(schedule, noise_scale, updates, done=0, ahead=1):
    """Train so many updates; a loader asks so many logical batches ahead. Returns the sizes that were asked for."""
    sizes = [schedule.ask(done + k) for k in range(ahead)]
    for k in range(updates):
        schedule.note(update(done + k + 1, sizes[k], noise_scale(done + k)))
        sizes.append(schedule.ask(done + k + ahead))
    return sizes


def test_it_grows_to_the_noise_scale_and_no_farther():
    """10 targets a row: 330 targets are 33 rows, of which 32 waste less than half."""
    assert run(ByNoise(8, 1024, every=2, smoothing=0.0), lambda _: 330.0, 12)[-1] == 32
    assert run(ByNoise(8, 1024, every=2, smoothing=0.0, share=0.2), lambda _: 330.0, 12)[-1] == 8
    assert run(ByNoise(8, 1024, every=2, smoothing=0.0, share=0.8), lambda _: 330.0, 30)[-1] == 128
    assert run(ByNoise(8, 24, every=2, smoothing=0.0), lambda _: 330.0, 12)[-1] == 24  # the cap


def test_it_waits_between_changes_and_for_the_measure():
    sizes = run(ByNoise(8, 1024, every=5, smoothing=0.0), lambda k: None if k < 7 else 1e9, 30)
    assert [sizes.index(size) for size in (16, 32, 64)] == [8, 13, 18]


def test_a_single_high_measure_is_smoothed_away():
    outlier = lambda k: 1e4 if k == 10 else 100.0  # noqa: E731
    assert run(ByNoise(8, 1024, every=2, smoothing=0.999), outlier, 30)[-1] == 8
    assert run(ByNoise(8, 1024, every=2, smoothing=0.0), outlier, 30)[-1] == 16  # what smoothing is for


def test_what_was_asked_for_stays_and_comes_again():
    """A loader that has read ahead gets the sizes that it was given, also when it reads the epoch once more."""
    schedule = ByNoise(8, 64, every=3, smoothing=0.0)
    sizes = run(schedule, lambda _: 1e9, 20, ahead=4)
    assert [schedule.at(done) for done in range(len(sizes))] == sizes
    assert sizes.index(16) == 6


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_it_goes_on_in_another_process(stop):
    whole = run(ByNoise(8, 256, every=3, smoothing=0.5), lambda k: 100.0 * k, 40)
    first, second = (ByNoise(8, 256, every=3, smoothing=0.5) for _ in range(2))
    run(first, lambda k: 100.0 * k, stop)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert run(second, lambda k: 100.0 * k, 40 - stop, done=stop) == whole[stop:]
    assert second.changes


def test_skipped_updates_and_those_without_a_measure_do_not_count():
    schedule = ByNoise(8, 64, every=1, smoothing=0.0)
    schedule.note(update(1, 8, None))
    schedule.note(update(2, 8, 1e9, skipped="the loss is nan"))
    assert schedule.at(5) == 8
    assert schedule.wanted is None


def test_a_record_without_rows_needs_a_size():
    schedule = ByNoise(8, 64)
    with pytest.raises(wb.ConfigError, match="size="):
        schedule.note(update(1, 8, 1.0, rows=None))
    schedule.note(update(1, 8, 1.0, rows=None), size=8)


def adam(**options):
    return torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=0.01, betas=(0.9, 0.99), eps=1e-8, **options)


def test_rules():
    adamw = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    assert rescaled(adamw, 4, "none") == {}
    assert rescaled(adamw, 4, "linear") == {"lr": 0.04}
    assert rescaled(adamw, 4, "sqrt") == {"lr": 0.02, "betas": (0.9**4, 0.99**4), "eps": 5e-9}
    assert rescaled({"lr": 0.01}, 0.25, "sqrt") == {"lr": 0.005}
    assert ema_decay(0.99, 4) == 0.99**4


def test_beta_to_the_power_k_agrees_with_the_paper_to_first_order():
    for k in (2, 8):
        (_, beta) = rescaled({"lr": 1, "betas": (0.9, 1 - 1e-6)}, k, "sqrt")["betas"]
        assert 1 - beta == pytest.approx(k * 1e-6, rel=1e-4)


def test_a_power_stays_a_beta_where_the_first_order_does_not():
    assert all(0 < beta < 1 for beta in rescaled({"lr": 1, "betas": (0.9, 0.99)}, 64, "sqrt")["betas"])
    assert 1 - 64 * (1 - 0.9) < 0


@pytest.mark.parametrize(("factor", "rule"), [(0, "sqrt"), (math.inf, "sqrt"), ("4", "linear"), (2, "cube")])
def test_what_is_no_rule_or_no_factor_gets_a_hint(factor, rule):
    with pytest.raises(wb.ConfigError, match="hint: "):
        Change.of(adam(), factor, rule)


def test_what_has_no_settings_follows_no_size():
    with pytest.raises(wb.ConfigError, match="a int without parameter groups") as error:
        Rates(3, at=64, rule="sqrt")
    assert "param_groups" in error.value.hint


def test_a_change_is_computed_first_and_applied_when_asked():
    optimizer = adam()
    change = Change.of(optimizer, 4, "sqrt")
    assert optimizer.param_groups[0]["lr"] == 0.01
    change.apply(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert optimizer.param_groups[0]["betas"] == (0.9**4, 0.99**4)
    assert "0.01" in str(change)
    assert str(Change.of(optimizer, 1, "sqrt")).splitlines()[1] == "  nothing changes"


def test_each_parameter_group_keeps_its_proportion():
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.3}])
    change = Change.of(optimizer, 2, "linear")
    change.apply(optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.6]
    assert "parameter group 1" in str(change)


def test_a_learning_rate_in_a_tensor_stays_in_it():
    lr = torch.tensor(0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=lr)
    Change.of(optimizer, 4, "linear").apply(optimizer)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.4)


def lr_schedules(optimizer):
    schedules = torch.optim.lr_scheduler
    yield lambda o: schedules.CosineAnnealingLR(o, 20, eta_min=0.001)
    yield lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + step))
    yield lambda o: schedules.StepLR(o, 3, gamma=0.5)
    yield lambda o: schedules.CyclicLR(o, 0.01, 0.1, step_size_up=5, cycle_momentum=False)
    yield lambda o: schedules.OneCycleLR(o, 0.1, total_steps=20)
    yield lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=5), schedules.CosineAnnealingLR(o, 15)], [5]
    )


def test_a_warm_up_that_stands_at_zero_goes_on_too():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    change = Change.of(optimizer, 4, "linear")
    change.apply(optimizer, [schedule])
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.04)
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.4)


@pytest.mark.parametrize("place", range(6))
def test_a_schedule_of_the_learning_rate_goes_on_from_the_new_one(place):
    """From a change on it is everywhere what it would have been, times the factor."""

    def rates(changes):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
        schedule = list(lr_schedules(optimizer))[place](optimizer)
        seen = []
        for step in range(15):
            if changes and step == 4:
                Change.of(optimizer, 4, "linear").apply(optimizer, schedule)
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return seen

    without, changed = rates(False), rates(True)
    assert changed[:4] == without[:4]
    assert changed[4:] == pytest.approx([4 * lr for lr in without[4:]])


def test_without_the_schedule_the_old_rates_come_back():
    """The mistake that the argument is for."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    Change.of(optimizer, 4, "linear").apply(optimizer)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_an_optimizer_follows_the_sizes():
    optimizer = adam()
    rates = Rates(optimizer, at=64, rule="sqrt")
    assert rates.follow(64) is None
    assert rates.follow(256).factor == 4
    assert optimizer.param_groups[0]["lr"] == 0.02
    other = Rates(optimizer, at=64, rule="sqrt")
    other.load_state_dict(rates.state_dict())
    assert other.follow(256) is None
    assert other.follow(64).factor == 0.25
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    with pytest.raises(wb.ConfigError):
        Rates(optimizer, at=0, rule="sqrt")
    with pytest.raises(wb.ConfigError):
        Rates(optimizer, at=4, rule="cube")
