"""A step in slices is the step, bit for bit, wherever it was broken off; and so little memory suffices for it."""

import copy

import pytest
import torch
from torch import nn, optim
from torch.utils._python_dispatch import TorchDispatchMode

import wholebatch as wb
from properties import fingerprint, state_of
from wholebatch.engine import memory
from wholebatch.engine.steps import slicing, stepping
from wholebatch.engine.steps.slicing import COPIES, FEWER, NUMBER_BY_NUMBER, NUMBERS, Reserve, Slices, can_be_sliced

CPU = torch.device("cpu")
KINDS = sorted((kind.__name__, kind) for kind in NUMBER_BY_NUMBER)
OPTIONS = {
    "plain": {},
    "foreach": {"foreach": True},
    "decay": {"weight_decay": 0.1},
}
FURTHER = [
    ("SGD", optim.SGD, {"momentum": 0.9, "nesterov": True, "foreach": True}),
    ("Adam", optim.Adam, {"amsgrad": True, "fused": True}),
    ("AdamW", optim.AdamW, {"lr": torch.tensor(0.01)}),
    ("RMSprop", optim.RMSprop, {"momentum": 0.9, "centered": True}),
]
EVERY = [(*one, OPTIONS[name]) for one in KINDS for name in OPTIONS if not (one[0] == "Rprop" and name == "decay")]


def tensors(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    shapes = [(70, 130), (2, 3, 31, 47), (5,), (), (1, 1)]
    made = [nn.Parameter(torch.randn(shape, generator=draw, dtype=dtype)) for shape in shapes]
    made[1].data = made[1].data.to(memory_format=torch.channels_last)
    return made


def learn(parameters, seed):
    draw = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter).copy_(
            torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
        )


@pytest.mark.parametrize(
    ("name", "kind", "options"), EVERY + FURTHER, ids=lambda each: each if isinstance(each, str) else ""
)
def test_a_step_in_slices_is_the_step(name, kind, options):
    plain, sliced = tensors(), tensors()
    one, other = kind(plain, **options), kind(sliced, **options)
    for each, parameters in ((one, plain), (other, sliced)):
        learn(parameters, 1)
        each.step()
        learn(parameters, 2)
    one.step()
    reserve = Reserve(CPU)
    reserve.take()
    for parameter in sliced:
        assert can_be_sliced(other, parameter)
        Slices(other, parameter, reserve).step(NUMBERS)
    assert fingerprint([plain, one.state_dict()]) == fingerprint([sliced, other.state_dict()])
    learn(plain, 3)
    learn(sliced, 3)
    one.step()
    other.step()
    assert fingerprint([plain, one.state_dict()]) == fingerprint([sliced, other.state_dict()])


class Out(TorchDispatchMode):
    """Raises at one operation."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        result = func(*args, **(kwargs or {}))
        if self.left == 0:
            raise MemoryError
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_slices_go_on_where_they_were_broken_off(dtype):
    """At any operation: what is left is that of an unbroken step."""
    broken = 0
    for at in range(1, 400, 3):
        plain, sliced = tensors(dtype)[:1], tensors(dtype)[:1]
        one, other = optim.AdamW(plain, lr=0.1), optim.AdamW(sliced, lr=0.1)
        for each, parameters in ((one, plain), (other, sliced)):
            learn(parameters, 1)
            each.step()
            learn(parameters, 2)
        one.step()
        reserve = Reserve(CPU)
        reserve.take()
        slices = Slices(other, sliced[0], reserve)
        try:
            with Out(at):
                slices.step(NUMBERS)
        except MemoryError:
            broken += 1
            slices.step(FEWER)
        assert fingerprint([plain, one.state_dict()]) == fingerprint([sliced, other.state_dict()]), at
    assert broken > 10


def test_what_cannot_be_sliced():
    weight = nn.Parameter(torch.randn(4, 6))
    sgd = optim.SGD([weight], lr=0.1)
    assert not can_be_sliced(sgd, weight)  # no gradient
    weight.grad = torch.randn(6, 4).t()
    assert not can_be_sliced(sgd, weight)
    weight.grad = torch.randn(4, 6).to_sparse()
    assert not can_be_sliced(sgd, weight)
    weight.grad = torch.randn(4, 6)
    assert can_be_sliced(sgd, weight)
    assert not can_be_sliced(optim.Adafactor([weight]), weight)
    sgd.state[weight] = {"rows": torch.zeros(4)}
    assert not can_be_sliced(sgd, weight)
    sgd.state[weight] = {"turned": torch.zeros(6, 4)}
    assert not can_be_sliced(sgd, weight)
    sgd.state[weight] = {"turned": torch.zeros(2, 2, 6)}
    assert not can_be_sliced(sgd, weight)


def test_copies_of_wide_numbers_have_room():
    weight = nn.Parameter(torch.randn(5000, dtype=torch.complex128))
    adam = optim.Adam([weight], amsgrad=True)
    for _ in range(2):
        weight.grad = torch.randn_like(weight)
        adam.step()
    before = copy.deepcopy([weight, adam.state_dict()])
    weight.grad = torch.randn_like(weight)
    reserve = Reserve(CPU)
    reserve.take()
    assert reserve.copies.nbytes == COPIES
    Slices(adam, weight, reserve).step(NUMBERS)
    found = fingerprint([weight, adam.state_dict()])
    (other,) = [before[0]]
    again = optim.Adam([other], amsgrad=True)
    again.load_state_dict(before[1])
    other.grad = weight.grad
    again.step()
    assert fingerprint([other, again.state_dict()]) == found


class Taken(TorchDispatchMode):
    """From one moment on, nothing larger than a slice can be had."""

    def __init__(self, moved):
        super().__init__()
        self.moved = moved
        self.refused = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.moved() and not func.is_view and not func._schema.is_mutable:
            made = result if isinstance(result, list | tuple) else [result]
            if any(isinstance(each, torch.Tensor) and each.numel() > 3 * slicing.FEWER for each in made):
                self.refused += 1
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return result


@pytest.mark.parametrize("options", [{}, {"foreach": True}], ids=str)
def test_an_update_that_has_begun_is_ended_where_only_the_reserve_is_left(options, monkeypatch):
    """In pieces, once the first has moved, nothing but the reserve: the update is that of a run with memory."""
    monkeypatch.setattr(stepping, "WHOLE", 0)
    monkeypatch.setattr(stepping, "PIECES", 3)
    monkeypatch.setattr(memory, "free_cached", lambda _device: None)

    def run(modes):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(80, 80) for _ in range(4)))
        optimizer = optim.AdamW(model.parameters(), **options)
        accumulator = wb.Accumulator(
            model, optimizer, lambda model, x: model(x).square().mean(), micro_batch=wb.Rows(4), check=None
        )
        step, updates = accumulator._setup.update.step, []
        for mode in modes:

            def stepped(mode=mode):
                if mode is None:
                    return step()
                with mode:
                    return step()

            accumulator._setup.update.step = stepped
            updates.append(accumulator.step(torch.ones(8, 80)))
        assert [update.retries for update in updates] == [0] * len(modes)
        return state_of(model, optimizer)

    pieces = []
    plain = stepping.Piece.step

    def counted(piece):
        plain(piece)
        pieces.append(piece)

    clean = run([None] * 3)
    monkeypatch.setattr(stepping.Piece, "step", counted)
    taken = Taken(lambda: len(pieces) > 0)
    assert run([None, taken, None]) == clean
    assert taken.refused > 0


def test_a_reserve_that_cannot_be_had_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(stepping, "WHOLE", 0)
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = optim.AdamW(model.parameters())
    accumulator = wb.Accumulator(model, optimizer, lambda model, x: model(x).sum(), micro_batch=wb.Rows(1), check=None)
    accumulator.step(torch.ones(1, 3))
    before = state_of(model, optimizer)

    def refuse(_):
        raise MemoryError("not even that")

    monkeypatch.setattr(Reserve, "take", refuse)
    with pytest.raises(wb.OutOfMemoryError, match="not even that"):
        accumulator.step(torch.ones(1, 3))
    assert state_of(model, optimizer) == before
