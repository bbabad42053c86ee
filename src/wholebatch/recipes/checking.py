"""Is the update of this recipe, cut, that of its undivided batch?"""

import random
from typing import Literal

from wholebatch.evidence.verify import Verification, verify
from wholebatch.recipes.amount import Amount
from wholebatch.recipes.config import Layer, configure, defaults_of
from wholebatch.recipes.ingredients import cut_of, model_of, rows_of, seed_everything
from wholebatch.recipes.protocol import Recipe


def check_recipe(
    recipe: Recipe, *, rows: int = 64, micro_batch: Amount | Literal["auto"] = "auto", seed: int = 0
) -> Verification:
    """Compare the update of a batch of the recipe, cut and uncut, on its untrained model.

    Where the recipe has a `step`, that loop is judged, else the accumulator with the recipe's loss.

    Args:
        recipe: What to look at.
        rows: How many of its rows make the batch; all of them if there are fewer. Unit: rows.
        micro_batch: How to cut; ``"auto"``: three parts.
        seed: Of the weights and of the choice of rows.

    Returns:
        The certificate.

    Raises:
        ConfigError: The recipe cannot be used, or does not count tokens.
        SplitError: There are fewer than two rows.

    Example:
        >>> from wholebatch.recipes.finding import find_recipe
        >>> check_recipe(find_recipe("images"), rows=6).ok
        True
    """
    cut = cut_of(recipe, micro_batch) if micro_batch != "auto" else None
    chosen = configure([defaults_of(recipe), Layer("asked for", {"recipe": recipe.name})]).batch_norm
    seed_everything(seed)
    available = rows_of(recipe, "train")
    places = random.Random(seed).sample(range(len(available)), min(rows, len(available)))
    return verify(
        model_of(recipe, chosen),
        recipe.loss,
        [available[place] for place in places],
        step=recipe.step,
        targets=recipe.targets,
        reduction=recipe.reduction,
        micro_batch=cut,
        collate=recipe.collate,
    )
