"""What is copied is put back, wherever the copies live."""

import dataclasses
from collections import OrderedDict, deque

import pytest
import torch
from torch import nn

from properties import fingerprint
from wholebatch.engine.steps import undo
from wholebatch.engine.steps.undo import Away, Beside, Undo


class OnHost(Away):
    """The way of an accelerator, on a CPU."""

    def copy(self, tensor):
        return self._copy_to_host(tensor)


class Full(Away):
    def copy(self, tensor):
        raise OSError("no space left on device")


class Exhausted(Beside):
    def copy(self, tensor):
        raise torch.OutOfMemoryError("CUDA out of memory")


@dataclasses.dataclass
class Kept:
    mean: torch.Tensor
    steps: int


def tensors():
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randn(100, 70, generator=draw),
        nn.Parameter(torch.randn(2, 64, 16, 16, generator=draw).to(memory_format=torch.channels_last)),
        torch.randn(90, 90, generator=draw).t(),
        torch.randn(200, 100, generator=draw)[:, ::2],
        torch.randn(90, 90, generator=draw, dtype=torch.complex64),
        torch.randn(90, 90, generator=draw).bfloat16(),
        torch.eye(80).to_sparse(),
        torch.tensor(3.0),
        torch.zeros(0),
        torch.arange(20000),
    ]


@pytest.mark.parametrize("room", [Beside, Away, OnHost])
def test_tensors_of_every_kind_are_put_back_again_and_again(room):
    place, values = room(), tensors()
    for _ in range(2):
        before = fingerprint(values)
        kept = Undo(values, place)
        for _ in range(2):
            with torch.no_grad():
                for value in values:
                    value.mul_(3)
                values[-1 if values[0].numel() else 0].add_(1)
            versions = [value._version for value in values]
            assert fingerprint(values) != before
            kept.put_back()
            assert fingerprint(values) == before
            assert all(
                value._version > version for value, version in zip(values, versions, strict=True) if len(value.shape)
            )
        values = values[::-1]


@pytest.mark.parametrize(("room", "other"), [(Full, Beside), (Exhausted, Away)])
def test_where_one_place_is_full_the_other_is_taken(room, other):
    values = tensors()
    with pytest.raises((OSError, torch.OutOfMemoryError)):
        Undo(values, room())
    kept = Undo(values, room(), other=other())
    before = fingerprint(values)
    with torch.no_grad():
        values[0].zero_()
    kept.put_back()
    assert fingerprint(values) == before


def test_other_errors_do_not_make_the_other_place_be_taken(monkeypatch):
    monkeypatch.setattr(undo, "_copied", lambda *_: {}["a mistake"])
    with pytest.raises(KeyError):
        Undo(tensors(), Beside(), other=Away())


def test_containers_hold_again_what_they_held():
    first = torch.ones(3)
    kept = Kept(torch.zeros(2), 1)
    state = {
        "list": [first, 1],
        "ordered": OrderedDict(a=(torch.ones(2), 2)),
        "deque": deque([1, 2], maxlen=2),
        "set": {1},
        "kept": kept,
        "number": 1,
    }
    state["itself"] = state
    undoing = Undo([state], Beside())
    state["list"].append(3)
    state["ordered"]["b"] = 1
    state["ordered"]["a"][0].add_(1)
    state["deque"].append(3)
    state["set"].add(2)
    kept.mean, kept.steps = torch.ones(1), 2
    state["number"], state["new"] = 2, 3
    first.add_(1)
    undoing.put_back()
    assert list(state) == ["list", "ordered", "deque", "set", "kept", "number", "itself"]
    assert state["list"][0] is first
    assert first.tolist() == [1, 1, 1]
    assert len(state["list"]) == 2
    assert list(state["ordered"]) == ["a"]
    assert state["ordered"]["a"][0].tolist() == [1, 1]
    assert list(state["deque"]) == [1, 2]
    assert state["set"] == {1}
    assert kept == Kept(kept.mean, 1)
    assert kept.mean.tolist() == [0, 0]
    assert state["number"] == 1


def test_an_optimizer_inside_an_optimizer_is_undone_too():
    weight = nn.Parameter(torch.ones(3))

    class Outer(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__([weight], {})
            self.inner, self.slow = inner, None

    outer = Outer(torch.optim.SGD([weight], lr=0.1, momentum=0.9))
    outer.slow = [weight.detach().clone()]
    undoing = Undo([outer], Beside())
    weight.grad = torch.ones(3)
    outer.inner.step()
    outer.slow[0].add_(1)
    outer.param_groups[0]["k"] = 1
    undoing.put_back()
    assert weight.tolist() == [1, 1, 1]
    assert outer.slow[0].tolist() == [1, 1, 1]
    assert dict(outer.inner.state) == {}
    assert "k" not in outer.param_groups[0]
