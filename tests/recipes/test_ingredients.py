"""Rows, model and optimizer of a recipe, and what is said of those that cannot train."""

import random

import pytest
import torch
from tiny import Tiny, without
from torch import nn

import wholebatch as wb
from wholebatch.core.errors import ConfigError
from wholebatch.recipes.amount import Amount
from wholebatch.recipes.ingredients import cut_of, model_of, optimizer_of, rows_of, seed_everything
from wholebatch.recipes.protocol import Recipe


def recipe_with(**functions):
    tiny = Tiny()
    for name, function in functions.items():
        setattr(tiny, name, function)
    return Recipe.of(tiny, "tiny")


def test_a_seed_fixes_every_random_stream():
    def draw():
        return random.random(), torch.rand(()).item(), np.random.rand()

    np = pytest.importorskip("numpy")
    seed_everything(5)
    first = draw()
    assert draw() != first
    seed_everything(5)
    assert draw() == first


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "returned no rows"),
        (None, "returned a NoneType, not a sequence"),
        (iter([1]), "not a sequence"),
        ({"a": 1}, "returned a dict, not a sequence"),
    ],
)
def test_rows_that_cannot_be_trained_on(rows, said):
    with pytest.raises(ConfigError, match=said):
        rows_of(recipe_with(data=lambda _split: rows), "train")


def test_no_rows_to_validate_are_fine():
    assert rows_of(recipe_with(data=lambda _split: []), "validation") == []


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (None, "returned a NoneType, not a torch.nn.Module"),
        (nn.Linear, "returned a type, not"),
        (nn.ReLU(), "has no parameter that learns"),
        (nn.Linear(1, 1).requires_grad_(False), "has no parameter that learns"),
    ],
    ids=["None", "class", "no parameters", "frozen"],
)
def test_models_that_cannot_learn(model, said):
    with pytest.raises(ConfigError, match=said):
        model_of(recipe_with(model=lambda: model))


def test_a_model_trains_in_training_mode():
    assert model_of(recipe_with(model=lambda: nn.Sequential(nn.Linear(1, 1)).eval()))[0].training


@pytest.mark.parametrize(("lr", "rates"), [(None, [0.1, 0.2]), (0.05, [0.05, 0.05])])
def test_a_stated_rate_is_that_of_every_group(lr, rates):
    tiny = Tiny()
    optimizer = optimizer_of(Recipe.of(tiny, "tiny"), tiny.model(), lr)
    assert [group["lr"] for group in optimizer.param_groups] == rates


@pytest.mark.parametrize(("lr", "rate"), [(None, 1e-3), (0.05, 0.05)])
def test_without_an_optimizer_it_is_adamw_over_what_learns(lr, rate):
    model = nn.Sequential(nn.Linear(1, 2).requires_grad_(False), nn.Linear(2, 1))
    optimizer = optimizer_of(Recipe.of(without(Tiny(), "optimizer"), "tiny"), model, lr)
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert group["lr"] == rate
    assert [id(weight) for weight in group["params"]] == [id(weight) for weight in model[1].parameters()]


def test_amounts_become_micro_batches():
    recipe = Recipe.of(Tiny(), "tiny")
    assert cut_of(recipe, Amount(8, "rows")) == wb.Rows(8)
    assert cut_of(recipe, Amount(8, "tokens")).cut([3, 4, 5]) == [[2], [1, 0]]


def test_tokens_need_a_length():
    with pytest.raises(ConfigError, match=r"8 tokens was asked for, .* tiny does not say how many tokens"):
        cut_of(Recipe.of(without(Tiny(), "length"), "tiny"), Amount(8, "tokens"))
