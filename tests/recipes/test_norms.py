"""What is done about batch norm in the model of a recipe, and that a run does it."""

import json

import pytest
import torch
from torch import nn

import wholebatch as wb
from wholebatch.core.errors import ConfigError
from wholebatch.engine.batchnorm import batch_dependent_layers
from wholebatch.recipes import images
from wholebatch.recipes.checking import check_recipe
from wholebatch.recipes.config import TrainConfig
from wholebatch.recipes.finding import find_recipe
from wholebatch.recipes.ingredients import model_of
from wholebatch.recipes.job import train
from wholebatch.recipes.norms import treated
from wholebatch.recipes.protocol import Recipe


class Plain:
    """Somebody's recipe with batch norm, who has heard of none of this."""

    def data(self, split):
        return list(torch.randn(16, 4, generator=torch.Generator().manual_seed(0))) if split == "train" else []

    def model(self):
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))

    def collate(self, rows):
        return torch.stack(rows)

    def loss(self, model, micro_batch):
        return (model(micro_batch).squeeze(1) - micro_batch.sum(1)).square().mean()


PLAIN = Recipe.of(Plain(), "plain")


@pytest.mark.parametrize(
    ("choice", "kind"),
    [
        ("refuse", "BatchNorm1d"),
        ("per_micro_batch", "BatchNorm1d"),
        ("exact", "ExactBatchNorm1d"),
        ("frozen", "FrozenBatchNorm1d"),
        ("group", "GroupNorm"),
    ],
)
def test_batch_norm_of_any_recipe_is_what_was_chosen(choice, kind):
    assert type(model_of(PLAIN, choice)[1]).__name__ == kind


@pytest.mark.parametrize("choice", ["exact", "frozen", "group", "per_micro_batch"])
def test_a_model_without_batch_norm_has_nothing_to_choose(choice):
    with pytest.raises(ConfigError, match=f"'{choice}', and the model of text has no batch norm"):
        model_of(find_recipe("text"), choice)


def test_a_recipe_that_is_told_may_see_to_it_itself():
    recipe = find_recipe("images")
    kinds = {
        choice: {type(layer).__name__ for layer in model_of(recipe, choice).modules() if "Norm" in type(layer).__name__}
        for choice in ("refuse", "group", "exact", "frozen", "per_micro_batch")
    }
    assert kinds == {
        "refuse": {"GroupNorm"},
        "group": {"GroupNorm"},
        "exact": {"ExactBatchNorm2d"},
        "frozen": {"FrozenBatchNorm2d"},
        "per_micro_batch": {"BatchNorm2d"},
    }
    without = nn.Linear(1, 1)
    assert treated(without, recipe, "exact") is without


def test_all_networks_of_images_begin_with_the_same_weights():
    networks = []
    for choice in ("group", "exact"):
        torch.manual_seed(0)
        networks.append(list(images.model(choice).parameters()))
    assert sum(weight.numel() for weight in networks[0]) == 20_538
    assert all(torch.equal(one, other) for one, other in zip(*networks, strict=True))


def final_weights(choice, rows, tmp_path):
    """Return the weights and buffers after a run, as a caller of `train` can reach them."""
    kept = []

    class Kept(Plain):
        def model(self):
            kept.append(super().model().double())
            return kept[0]

        def collate(self, rows):
            return super().collate(rows).double()

    config = TrainConfig(
        recipe="plain",
        logical_batch="16 rows",
        micro_batch=f"{rows} rows",
        updates=3,
        batch_norm=choice,
        compare=False,
        out=str(tmp_path / f"{choice}-{rows}"),
    )
    train(config, recipe=Recipe.of(Kept(), "plain"))
    return torch.cat([each.flatten().double() for each in kept[0].state_dict().values()])


def test_a_run_is_that_of_the_undivided_batch_where_batch_norm_is_exact_and_not_where_it_is_per_micro_batch(tmp_path):
    whole = final_weights("exact", 16, tmp_path)
    torch.testing.assert_close(final_weights("exact", 4, tmp_path), whole, rtol=1e-9, atol=1e-9)
    assert (final_weights("per_micro_batch", 4, tmp_path) - whole).norm() / whole.norm() > 0.01
    start = json.loads((tmp_path / "exact-4" / "log.jsonl").read_text().splitlines()[0])
    assert (start["batch_norm"], start["config"]["batch_norm"]) == ("exact", "exact")


def test_a_run_with_joined_graphs_does_not_boast_of_memory(tmp_path):
    final_weights("exact", 4, tmp_path)
    final_weights("per_micro_batch", 4, tmp_path)
    lines = {
        choice: json.loads((tmp_path / f"{choice}-4" / "log.jsonl").read_text().splitlines()[-1])["summary"]
        for choice in ("exact", "per_micro_batch")
    }
    assert "4 rows run at once, with the activations of all held" in lines["exact"]
    assert "4 rows in memory at once" in lines["per_micro_batch"]


def test_a_run_that_says_nothing_is_refused(tmp_path):
    with pytest.raises(wb.BatchNormError, match=r"wb\.exact_batch_norm"):
        final_weights("refuse", 4, tmp_path)


def test_what_a_recipe_chooses_by_default_is_what_is_verified():
    assert not check_recipe(PLAIN, rows=12).ok
    recipe = Plain()
    recipe.defaults = {"batch_norm": "exact"}
    assert check_recipe(Recipe.of(recipe, "plain"), rows=12).ok


def test_frozen_and_converted_layers_depend_on_no_batch():
    assert batch_dependent_layers(model_of(PLAIN, "per_micro_batch"))
    for choice in ("frozen", "group"):
        assert batch_dependent_layers(model_of(PLAIN, choice)) == []
