"""Where the running sum of gradients lives: 16 bits do not rot, wider ones sum in their own dtype."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import mse_loss

import wholebatch as wb
from menagerie import CALM, mlp, numbers, whole_numbers
from properties import flat, gradient_of, relative_error, sgd, stepped, undivided
from wholebatch.engine.narrow import CompensatedSum, check_sum_in

BF16_EPS = torch.finfo(torch.bfloat16).eps
MICRO_BATCHES = 1024
SUMS = ["fp32", "compensated", "weights"]


def small_model(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def signal_and_noise(signal, dtype, micro_batches=MICRO_BATCHES, rows=2):
    """Micro-batches whose gradients point the same way (signal) or almost cancel (noise)."""
    x = numbers(micro_batches, rows, 4, dtype=dtype).abs() if signal else numbers(micro_batches, rows, 4, dtype=dtype)
    y = numbers(micro_batches, rows, 2, dtype=dtype, seed=1) + (3.0 if signal else 0.0)
    return list(zip(x, y, strict=True))


def loss_of(model, part):
    return mse_loss(model(part[0]), part[1])


@functools.cache
def right_gradient(dtype, signal, micro_batches=MICRO_BATCHES):
    """The judge: each micro-batch's gradient as autograd gives it, added up in 64 bits."""
    micro_batches = signal_and_noise(signal, dtype, micro_batches)
    model = small_model(dtype)
    parameters = list(model.parameters())
    total = sum(flat(torch.autograd.grad(loss_of(model, part), parameters)) for part in micro_batches)
    return total / len(micro_batches)


def delivered(dtype, micro_batches, accumulate_in):
    model = small_model(dtype)
    optimizer = sgd(model.parameters())
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(flat(p.grad for p in model.parameters())))
    accumulator = wb.Accumulator(model, optimizer, loss_of, accumulate_in=accumulate_in, check=None)
    (update,) = accumulator.updates(iter(micro_batches), micro_batches=len(micro_batches))
    return seen[0], update


@pytest.mark.parametrize("signal", [True, False], ids=["signal", "noise"])
@pytest.mark.parametrize("accumulate_in", ["fp32", "compensated"])
def test_bf16_gradients_of_1024_micro_batches_are_within_4_eps_of_an_fp32_sum(accumulate_in, signal):
    micro_batches = signal_and_noise(signal, torch.bfloat16)
    found, update = delivered(torch.bfloat16, micro_batches, accumulate_in)
    right = right_gradient(torch.bfloat16, signal)
    assert relative_error(found, right) <= 4 * BF16_EPS
    # The norm is that of the sum before it is rounded to bfloat16: additions are rounded to nearest, not cut off.
    assert update.grad_norm == pytest.approx(float(right.norm()), rel=2**-11)


def test_sixteen_bits_are_summed_in_fp32_unless_something_else_is_asked_for():
    micro_batches = signal_and_noise(True, torch.bfloat16, 64)
    default, fp32, weights = (delivered(torch.bfloat16, micro_batches, each)[0] for each in (None, "fp32", "weights"))
    assert torch.equal(default, fp32)
    assert not torch.equal(default, weights)


def test_the_bound_sees_a_sum_in_16_bits():
    """Naive sums stagnate: once the sum is 256 times as large as an addend, the addend is rounded away."""
    micro_batches = signal_and_noise(True, torch.bfloat16)
    found, _ = delivered(torch.bfloat16, micro_batches, "weights")
    right = right_gradient(torch.bfloat16, True)
    assert relative_error(found, right) > 10 * 4 * BF16_EPS
    assert float(found.norm()) < 0.7 * float(right.norm())


@pytest.mark.parametrize("accumulate_in", ["fp32", "compensated"])
def test_fp16_weights_are_summed_in_more_bits_too(accumulate_in):
    micro_batches = signal_and_noise(True, torch.float16, 256)
    found, _ = delivered(torch.float16, micro_batches, accumulate_in)
    assert relative_error(found, right_gradient(torch.float16, True, 256)) <= 4 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("accumulate_in", SUMS)
def test_wider_weights_sum_in_their_own_dtype_whatever_is_asked_for(accumulate_in):
    animal = CALM["mlp"]
    batch = animal.batch(9, torch.float64)
    right = gradient_of(animal, undivided(animal), batch, dtype=torch.float64)
    way = stepped(animal, wb.Rows(2), accumulate_in=accumulate_in)
    assert relative_error(gradient_of(animal, way, batch, dtype=torch.float64), right) <= 1e-12


@settings(max_examples=60)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=20),
    specials=st.lists(st.sampled_from([math.inf, -math.inf, math.nan]), max_size=1),
)
def test_a_compensated_sum_keeps_24_bits_of_each_addition(values, specials):
    """Three bytes of a float32: the relative error of an addition is at most 2**-16 of what is added up so far."""
    kept, exact, reached = CompensatedSum(), 0.0, 0.0
    for value in [*values, *specials]:
        addend = torch.tensor([value]).bfloat16()
        kept.add(addend)
        exact += float(addend)
        reached = max(reached, abs(exact)) + abs(float(addend))
    total = float(kept.total())
    if math.isfinite(exact):
        assert abs(total - exact) <= len(values) * 2**-16 * reached
    else:
        assert math.isnan(total) if math.isnan(exact) else total == exact
    kept.clear()
    assert not kept.holds


@pytest.mark.parametrize("accumulate_in", SUMS)
def test_sparse_gradients_in_16_bits_are_those_of_the_whole_batch(accumulate_in):
    torch.manual_seed(0)
    model = nn.Embedding(11, 4, sparse=True).bfloat16()
    tokens = whole_numbers(11, 12)
    seen = []
    optimizer = sgd(model.parameters())
    optimizer.register_step_pre_hook(lambda *_: seen.append(flat([model.weight.grad])))
    accumulator = wb.Accumulator(
        model,
        optimizer,
        lambda m, x: m(x).pow(2).mean(),
        micro_batch=wb.Rows(5),
        accumulate_in=accumulate_in,
        clip_norm=100.0,
        check=None,
    )
    update = accumulator.step(tokens)
    torch.manual_seed(0)
    weight = nn.Embedding(11, 4).bfloat16().weight.detach().double()
    right = (2 * weight * torch.bincount(tokens, minlength=11)[:, None] / (12 * 4)).flatten()
    assert relative_error(seen[0], right) <= 4 * BF16_EPS
    assert update.grad_norm == pytest.approx(float(right.norm()), rel=4 * BF16_EPS)


@pytest.mark.parametrize("accumulate_in", ["fp32", "compensated"])
def test_frozen_16_bit_weights_may_be_unfrozen_later(accumulate_in):
    model = small_model(torch.bfloat16)
    model[0].requires_grad_(False)
    accumulator = wb.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.5), loss_of, accumulate_in=accumulate_in, check=None
    )
    parts = signal_and_noise(True, torch.bfloat16, 64)
    frozen = flat(model[0].parameters())
    assert [update.applied for update in accumulator.updates(parts, micro_batches=64)] == [True]
    assert torch.equal(flat(model[0].parameters()), frozen)
    model[0].requires_grad_(True)
    right = sum(flat(torch.autograd.grad(loss_of(model, part), list(model.parameters()))) for part in parts) / len(
        parts
    )
    (update,) = accumulator.updates(parts, micro_batches=64)
    assert update.grad_norm == pytest.approx(float(right.norm()), rel=4 * BF16_EPS)
    assert not torch.equal(flat(model[0].parameters()), frozen)


def test_weights_that_become_16_bits_later_are_summed_in_fp32_too():
    parts = signal_and_noise(True, torch.bfloat16, 256)
    changes = []
    for later in (True, False):
        model = small_model(torch.float32 if later else torch.bfloat16)
        accumulator = wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.5), loss_of, check=None)
        model.bfloat16()
        (update,) = accumulator.updates(parts, micro_batches=256)
        changes.append((update.grad_norm, flat(model.parameters())))
    assert changes[0][0] == changes[1][0]
    assert torch.equal(changes[0][1], changes[1][1])


def test_never_more_than_one_parameter_has_a_16_bit_gradient_beside_the_sum():
    """Gradients are added as they arrive; ``.grad`` stays empty until the update."""
    model = small_model(torch.bfloat16)
    accumulator = wb.Accumulator(model, sgd(model.parameters()))
    at_once = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: at_once.append(sum(p.grad is not None for p in model.parameters()))
        )
    with accumulator.window() as window:
        for part in signal_and_noise(True, torch.bfloat16, 3):
            window.backward(loss_of(model, part), targets=2)
            assert all(parameter.grad is None for parameter in model.parameters())
    assert max(at_once) <= 1


def test_a_plain_backward_pass_outside_a_window_is_left_alone():
    model = small_model(torch.bfloat16)
    accumulator = wb.Accumulator(model, sgd(model.parameters()), loss_of)
    loss_of(model, signal_and_noise(True, torch.bfloat16, 1)[0]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert accumulator.reasons == []


def test_the_hooks_go_with_the_accumulator():
    model = small_model(torch.bfloat16)
    accumulator = wb.Accumulator(model, sgd(model.parameters()))
    assert all(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    del accumulator
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_the_norm_is_that_of_all_parameters_over_dtypes_and_layouts():
    torch.manual_seed(0)
    model = nn.ModuleDict({"sparse": nn.Embedding(5, 2, sparse=True), "wide": nn.Linear(2, 3).double()})
    model["narrow"] = nn.Linear(2, 3).bfloat16()
    x = whole_numbers(5, 6)

    def loss_fn(model, x):
        hidden = model["sparse"](x)
        wide, narrow = model["wide"](hidden.double()), model["narrow"](hidden.bfloat16())
        return wide.pow(2).mean() + narrow.pow(2).mean().double()

    parameters = list(model.parameters())
    right = flat(torch.autograd.grad(loss_fn(model, x), parameters)).norm()
    for accumulate_in in ("fp32", "weights"):
        accumulator = wb.Accumulator(
            model, torch.optim.SGD(parameters, lr=0.0), loss_fn, accumulate_in=accumulate_in, micro_batch=wb.Rows(6)
        )
        assert accumulator.step(x).grad_norm == pytest.approx(float(right), rel=4 * BF16_EPS)


def test_a_sum_that_does_not_exist_is_refused():
    assert (check_sum_in(None), check_sum_in("compensated")) == ("fp32", "compensated")
    model = mlp()
    with pytest.raises(wb.WeightError, match="accumulate_in='bf16'") as error:
        wb.Accumulator(model, sgd(model.parameters()), accumulate_in="bf16")
    assert '"compensated"' in error.value.hint
