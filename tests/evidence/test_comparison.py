"""What did the cut bring? Figures that add up, and a model that is left as it was."""

import json

import pytest
import torch
from torch import nn

import wholebatch as wb
from menagerie import mean_square, mlp, numbers
from properties import assert_leaves_no_trace, flat, relative_error
from wholebatch.evidence.comparison import Still, compare, textbook_window

ROWS = [{"x": numbers(5, seed=k), "y": numbers(3, seed=100 + k)} for k in range(24)]
KEYS = [
    "gradient_error",
    "gradient_ok",
    "cut_peak_bytes",
    "undivided_peak_bytes",
    "targets_per_second",
    "plain_targets_per_second",
    "speedup",
    "why",
]
collate = torch.utils.data.default_collate


def test_the_figures_are_those_of_the_event_and_add_up():
    found = compare(mlp().double(), mean_square, ROWS, micro_batch=wb.Rows(4), collate=collate)
    plain = found.to_dict()
    assert list(plain) == KEYS
    assert json.loads(json.dumps(plain)) == plain
    assert found.gradient_error <= 1e-12
    assert found.targets_per_second > 0
    assert found.speedup == pytest.approx(found.targets_per_second / found.plain_targets_per_second)


@pytest.mark.parametrize("layer", [nn.Identity, lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(5)])
def test_a_comparison_leaves_weights_buffers_and_random_streams_alone(layer):
    model = nn.Sequential(layer(), nn.Linear(5, 3)).double()
    with assert_leaves_no_trace(model):
        compare(model, mean_square, ROWS, micro_batch=wb.Rows(4), collate=collate)


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


def test_dropout_is_silent_while_gradients_are_compared():
    """Other masks are no other gradient: a run of a model with dropout is not told that its updates were wrong."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    found = compare(model, mean_square, ROWS, micro_batch=wb.Rows(7), collate=collate)
    assert found.gradient_ok is True
    assert found.gradient_error <= 1e-12
    assert found.why is None


def test_gradients_that_depend_on_chance_are_not_compared():
    model = nn.Sequential(Noisy(), nn.Linear(5, 3)).double()
    found = compare(model, mean_square, ROWS, micro_batch=wb.Rows(7), collate=collate)
    assert (found.gradient_error, found.gradient_ok) == (None, None)
    assert found.why == "model or loss draw random numbers, and others when the batch is cut"
    assert found.speedup > 0


def test_a_mistake_beside_dropout_is_still_told():
    """Silence hides chance alone: a loss that averages over something else than rows stays off."""

    def masked(model, batch):
        seen = batch["x"][:, 0] > 0
        return (model(batch["x"]) - batch["y"]).square()[seen].mean()

    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    found = compare(model, masked, ROWS, micro_batch=wb.Rows(7), collate=collate)
    assert found.gradient_ok is False
    assert found.gradient_error > 1e-3


def test_a_comparison_of_a_pair_by_length_counts_the_targets():
    rows = [torch.ones(length, 5, dtype=torch.float64) for length in (9, 1, 2, 8, 3, 3)]

    def loss_fn(model, x):
        mask = x.abs().sum(2) > 0
        return (model(x).square().sum(2) * mask).sum(), mask.sum()

    def pad(some):
        return nn.utils.rnn.pad_sequence(some, batch_first=True)

    found = compare(
        mlp().double(), loss_fn, rows, micro_batch=wb.Tokens(10, length=len), collate=pad, plain_rows=2, seed=1
    )
    assert found.gradient_error <= 1e-12


class Catching(Still):
    def step(self):
        self.gradient = flat(parameter.grad for group in self.param_groups for parameter in group["params"])


def test_the_textbook_loop_is_a_mean_of_means():
    """The plain side of the comparison: right for equal counts, and off for a smaller last slice."""
    errors = []
    for rows in (24, 20):
        torch.manual_seed(0)
        model = mlp().double()
        catching = Catching(model.parameters())
        textbook_window(model, catching, mean_square, ROWS[:rows], collate=collate, rows_a_micro_batch=8)
        loss = mean_square(model, collate(ROWS[:rows]))
        right = flat(torch.autograd.grad(loss, list(model.parameters())))
        errors.append(relative_error(catching.gradient, right))
        assert all(parameter.grad is None for parameter in model.parameters())
    assert errors[0] <= 1e-12
    assert errors[1] > 1e-3
