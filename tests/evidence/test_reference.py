"""The judge: the plain loop over the whole batch, compared with derivatives by hand and with textbook lines."""

import copy

import pytest
import torch

from menagerie import CALM, mean_square, mlp, num_labels, numbers, regression, regularised_sum, sum_over_labels
from properties import flat, sgd
from wholebatch.evidence import reference


def test_the_gradient_of_a_least_square_is_the_one_by_hand():
    x, y = numbers(6, 4), numbers(6, 2, seed=1)
    model = torch.nn.Linear(4, 2, bias=False).double()
    loss = reference.gradient(model, lambda m, b: (m(b[0]) - b[1]).square().mean(), (x, y))
    error = x @ model.weight.detach().T - y
    assert loss.item() == pytest.approx(error.square().mean().item(), rel=1e-14)
    torch.testing.assert_close(model.weight.grad, 2 * error.T @ x / error.numel(), rtol=1e-13, atol=0)
    assert not loss.requires_grad


def test_what_was_in_the_gradients_before_is_gone():
    model = mlp().double()
    reference.gradient(model, mean_square, regression(5, torch.float64))
    once = flat(parameter.grad for parameter in model.parameters())
    reference.gradient(model, mean_square, regression(5, torch.float64))
    assert torch.equal(flat(parameter.grad for parameter in model.parameters()), once)


def test_a_sum_is_divided_by_its_targets_and_a_term_beside_it_is_not():
    animal = CALM["regulariser"]
    model, batch = animal.model(), animal.batch(7, torch.float64)
    loss, targets, once = regularised_sum(model, batch)
    assert reference.gradient(model, regularised_sum, batch).item() == pytest.approx((loss / targets + once).item())
    divided = reference.gradient(model, sum_over_labels, batch, targets=num_labels, reduction="sum")
    assert divided.item() == pytest.approx((loss / targets).item())


@pytest.mark.parametrize("clip_norm", [None, 0.1, 1e3])
def test_an_update_is_backward_clip_and_step(clip_norm):
    model = mlp().double()
    other = copy.deepcopy(model)
    reference.update(model, sgd(model.parameters()), mean_square, regression(5, torch.float64), clip_norm=clip_norm)
    mean_square(other, regression(5, torch.float64)).backward()
    gradient = flat(parameter.grad for parameter in other.parameters())
    if clip_norm is not None:
        gradient *= min(1.0, clip_norm / (float(gradient.norm()) + 1e-6))
    torch.testing.assert_close(flat(other.parameters()) - gradient, flat(model.parameters()), rtol=1e-13, atol=1e-15)
