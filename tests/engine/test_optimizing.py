"""What a few numbers tell of an optimizer is what a stand-in of all its weights does."""

import pytest
import torch
from torch import nn

import wholebatch as wb
from wholebatch.engine import memory
from wholebatch.engine.fit import optimizing

CPU = torch.device("cpu")

KINDS = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "maximize": True, "foreach": False}),
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"amsgrad": True, "maximize": True}),
    (torch.optim.AdamW, {"lr": torch.tensor(0.1)}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {"weight_decay": 0.1}),
    (torch.optim.Adamax, {}),
    (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    (torch.optim.Adadelta, {}),
    (torch.optim.ASGD, {}),
    (torch.optim.Rprop, {}),
]


def a_model():
    return nn.Sequential(nn.Embedding(50, 24), nn.Linear(24, 64), nn.LayerNorm(64), nn.Linear(64, 24, bias=False))


def stepped(model, optimizer, times=3):
    """Return what the last of some real steps takes for a moment."""
    for _ in range(times):
        for each in model.parameters():
            each.grad = torch.ones_like(each)
        with memory.tensor_peak() as peak:
            optimizer.step()
    return peak.peak_bytes


def kept(optimizer):
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(each.numel() * each.element_size() for each in values if isinstance(each, torch.Tensor))


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda each: getattr(each, "__name__", str(each)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_few_numbers_tell_what_all_take(kind, options, dtype):
    """To a few single numbers, which the profiler sees and nobody plans for."""
    model = a_model().to(dtype)
    optimizer = kind(model.parameters(), **options)
    told, most = optimizing._few_numbers(optimizer, CPU)
    before = [each.clone() for each in model.parameters()]
    assert not optimizer.state
    assert all(map(torch.equal, before, model.parameters()))
    assert most == pytest.approx(stepped(model, optimizer), abs=32)
    assert told == kept(optimizer)
    assert optimizing._few_numbers(optimizer, CPU) == (told, most)


def test_the_bound_sees_that_the_weight_before_is_forgotten():
    """Names of the weight before are still in use when the next one is stepped: a weight alone says too little."""
    model = a_model()
    optimizer = torch.optim.AdamW(model.parameters())
    _, alone = optimizing._one_by_one([optimizer], CPU)
    assert stepped(model, optimizer) > alone + 4000


def test_groups_with_settings_of_their_own_and_frozen_weights_are_told_apart():
    model = a_model()
    model[0].weight.requires_grad_(False)
    groups = [
        {"params": [*model[0].parameters(), *model[1].parameters()], "amsgrad": True},
        {"params": [*model[2].parameters(), *model[3].parameters()]},
    ]
    optimizer = torch.optim.AdamW(groups)
    assert optimizing._few_numbers(optimizer, CPU) == optimizing._on_meta(optimizer, CPU)


class Own(torch.optim.AdamW):
    """May do anything."""


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: Own(parameters),
        lambda parameters: torch.optim.Adafactor(parameters),
        lambda parameters: torch.optim.Adagrad(parameters),
        lambda parameters: torch.optim.LBFGS(parameters),
        lambda parameters: torch.optim.AdamW(parameters, foreach=True),
        lambda parameters: torch.optim.AdamW(parameters, capturable=True, foreach=False),
    ],
    ids=["own", "factored", "made at once", "lbfgs", "together", "capturable"],
)
def test_others_are_not_told_from_a_few(make):
    """Adafactor keeps a row and a column of a matrix, so that a few numbers say nothing of it."""
    assert optimizing._few_numbers(make(a_model().parameters()), CPU) is None


def test_a_state_that_is_there_in_part_is_not_told_from_a_few():
    model = a_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model[1].weight.grad = torch.ones_like(model[1].weight)
    optimizer.step()
    assert optimizing._few_numbers(optimizer, CPU) is None


def test_the_copies_of_a_step_that_writes_gradients_hold_these_too():
    """As with Nesterov's momentum; a budget that one of the largest weight's was not counted in would be passed."""
    model = nn.Sequential(nn.Linear(512, 700), nn.ReLU(), nn.Linear(700, 512))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    options = {"micro_batch": wb.Rows(4), "memory": "1GiB"}
    plan = wb.plan(model, optimizer, squares, torch.randn(4, 512), logical_batch=8, timed=False, **options)
    accumulator = wb.Accumulator(model, optimizer, squares, check=None, **options)
    for _ in range(3):
        with memory.tensor_peak() as peak:
            accumulator.step(torch.ones(8, 512))
    held = 2 * sum(each.nbytes for each in model.parameters())  # weights and momentum
    assert plan.peak_bytes == pytest.approx(held + peak.peak_bytes, rel=0.01)


def squares(model, x):
    return model(x).square().mean()
