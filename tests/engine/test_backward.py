"""A backward pass begins in autograd's engine, and gives what `torch.autograd.backward` gives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import wholebatch as wb
from wholebatch.engine import backward
from wholebatch.engine.backward import run_backward


def gradients(run: Callable[[list[Tensor], list[Tensor]], None]) -> list[Tensor]:
    """Of two losses, one of which is no scalar, where other numbers than 1 enter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    first, second = model(torch.randn(5, 3, dtype=torch.float64)).unbind(1)
    run([first.square().mean(), second], [torch.tensor(0.3, dtype=torch.float64), torch.linspace(-1, 1, 5).double()])
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_the_engine_gives_the_gradients_of_the_public_function():
    ours, public = gradients(run_backward), gradients(torch.autograd.backward)
    assert len(ours) == 4
    assert all(map(torch.equal, ours, public))


def test_the_public_function_stands_in_where_the_engine_is_not_found(monkeypatch: pytest.MonkeyPatch):
    called = []
    plain = torch.autograd.backward
    monkeypatch.setattr(backward, "_engine", None)
    monkeypatch.setattr(torch.autograd, "backward", lambda *given: called.append(given) or plain(*given))
    assert all(map(torch.equal, gradients(run_backward), gradients(plain)))
    assert len(called) == 1


class Listening(Tensor):
    """A tensor with a say in what is done to it."""

    heard: list[str] = []  # noqa: RUF012 - emptied by its test

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        cls.heard.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs)


def test_a_tensor_of_another_class_has_its_say_in_a_backward_pass():
    heard = []
    for run in (run_backward, torch.autograd.backward):
        Listening.heard.clear()
        leaf = torch.ones(2, requires_grad=True)
        run([leaf.sum().as_subclass(Listening)], [torch.tensor(2.0)])
        assert leaf.grad is not None
        assert leaf.grad.tolist() == [2.0, 2.0]
        heard.append(set(Listening.heard))
    assert heard[1] <= heard[0]
    assert heard[1]


def two_losses_of_one_graph():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    hidden = model[:2](torch.randn(5, 3))
    accumulator = wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with accumulator.window() as window:
        window.backward(model[2](hidden).mean(), targets=5)
        window.backward(hidden.square().mean(), targets=5)


def backward_in_the_loss():
    def loss_fn(model, x):
        loss = model(x).square().mean()
        loss.backward()
        return loss

    model = nn.Linear(3, 2)
    accumulator = wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, micro_batch=wb.Rows(2))
    accumulator.step(torch.randn(5, 3))


@pytest.mark.parametrize("wrong", [two_losses_of_one_graph, backward_in_the_loss], ids=lambda wrong: wrong.__name__)
def test_a_graph_that_is_used_up_is_an_error_with_a_hint(wrong: Callable[[], None]):
    with pytest.raises(wb.LossError, match="has gone through the graph of this loss before") as error:
        wrong()
    assert "detach()" in str(error.value.hint)


def test_any_other_error_of_a_backward_pass_leaves_as_it_is():
    weight = torch.ones(3, requires_grad=True)
    held = weight.exp()
    loss = held.sum()
    held.detach().zero_()  # which the pass needs as it was
    with pytest.raises(RuntimeError, match="inplace operation") as error:
        run_backward([loss], [torch.ones(())])
    assert not isinstance(error.value, wb.LossError)
