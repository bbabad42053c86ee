"""A recipe's batch, cut and uncut."""

import pytest
from tiny import Tiny

from wholebatch.core.errors import SplitError
from wholebatch.recipes.amount import Amount
from wholebatch.recipes.checking import check_recipe
from wholebatch.recipes.protocol import Recipe


@pytest.mark.parametrize(
    ("micro_batch", "parts"), [("auto", 3), (Amount(5, "rows"), 4), (Amount(1, "tokens"), 20)], ids=str
)
def test_a_sound_recipe_is_found_equal(micro_batch, parts):
    found = check_recipe(Recipe.of(Tiny(), "tiny"), rows=20, micro_batch=micro_batch)
    assert found.ok
    assert found.error <= 1e-12
    assert (found.rows, found.micro_batches) == (20, parts)


def test_a_loss_that_is_no_sum_over_targets_is_found():
    class MeanOfMeans(Tiny):
        def loss(self, model, micro_batch):
            loss_sum, targets = super().loss(model, micro_batch)
            return loss_sum / targets  # a mean over numbers, declared as one over rows

    found = check_recipe(Recipe.of(MeanOfMeans(), "tiny"), rows=20)
    assert not found.ok
    assert found.cause is not None


def test_it_takes_what_rows_there_are():
    assert check_recipe(Recipe.of(Tiny(), "tiny"), rows=1000).rows == 40
    with pytest.raises(SplitError):
        check_recipe(Recipe.of(Tiny(), "tiny"), rows=1)
