"""Does this recipe fit, and how is its logical batch best cut?"""

import random

from wholebatch.core.plan import Plan
from wholebatch.engine.fit.planning import plan
from wholebatch.recipes.config import TrainConfig
from wholebatch.recipes.ingredients import cut_of, model_of, no_length, optimizer_of, rows_of, seed_everything
from wholebatch.recipes.protocol import Recipe

SAMPLE = 256
"""A plan looks at so many rows: the longest, and others as they come. Unit: rows."""


def plan_recipe(
    recipe: Recipe,
    config: TrainConfig,
    *,
    timed: bool = True,
    ranks: int = 1,
    bandwidth: str | None = None,
    latency: str | float = 0.0,
) -> Plan:
    """Return how a recipe is best trained within a budget.

    Args:
        recipe: What to look at.
        config: What was asked for: logical batch, micro-batch, budget, precision.
        timed: Whether passes are timed.
        ranks: As for `wb.plan`.
        bandwidth: The same.
        latency: The same.

    Raises:
        ConfigError: The recipe cannot be used, or does not count tokens.

    Example:
        >>> from wholebatch.recipes.finding import find_recipe
        >>> config = TrainConfig(recipe="images", logical_batch="64 rows", memory="1GiB")
        >>> plan_recipe(find_recipe("images"), config, timed=False).micro_batches
        1
    """
    seed_everything(config.seed)
    available = rows_of(recipe, "train")
    places = random.Random(config.seed).sample(range(len(available)), min(SAMPLE, len(available)))
    rows = [available[place] for place in places]
    if recipe.length is not None:
        rows[0] = max((available[place] for place in range(len(available))), key=recipe.length)
    count = config.logical_batch.count
    if config.logical_batch.unit == "tokens":
        if recipe.length is None:
            raise no_length(recipe, f"An amount of {config.logical_batch}")
        count = max(1, round(count * len(rows) / sum(map(recipe.length, rows))))
    model = model_of(recipe, config.batch_norm)
    return plan(
        model,
        optimizer_of(recipe, model, config.lr),
        recipe.loss,
        rows,
        count,
        config.memory,
        targets=recipe.targets,
        reduction=recipe.reduction,
        micro_batch="auto" if config.micro_batch == "auto" else cut_of(recipe, config.micro_batch),
        collate=recipe.collate,
        length=recipe.length,
        precision=config.precision,
        accumulate_in=config.accumulate_in,
        timed=timed,
        ranks=ranks,
        bandwidth=bandwidth,
        latency=latency,
    )
