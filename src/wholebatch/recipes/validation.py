"""How good is the model on rows that it has not seen?"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from wholebatch.core.batch import LogicalBatch
from wholebatch.core.errors import ConfigError
from wholebatch.core.split import Indices, Rows, Tokens
from wholebatch.engine.device import input_device, move
from wholebatch.recipes.protocol import Recipe


def validate(
    model: nn.Module,
    recipe: Recipe,
    rows: Sequence[Any],
    *,
    micro_batch: Rows | Tokens,
    autocast: Callable[[], AbstractContextManager[object]],
) -> dict[str, float]:
    """Return the loss of some rows and whatever else the recipe measures. The model trains on as before.

    Args:
        model: Evaluated in evaluation mode and without gradients; each of its modules gets its mode back.
        recipe: Says what the loss is.
        rows: Of the validation split.
        micro_batch: How many rows at once.
        autocast: Makes the context in which the model runs, as in training.

    Returns:
        ``{"loss": sum over targets / targets}``, and the recipe's measures after it.

    Raises:
        ConfigError: `measure` returned something else than a dict of numbers.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), autocast():
            measures = {"loss": mean_loss(model, recipe, rows, micro_batch)}
            if recipe.measure is not None:
                measures |= _numbers(recipe.measure(model, rows), recipe)
    finally:
        for module, training in modes.items():
            module.training = training
    return measures


@torch.no_grad()
def mean_loss(model: nn.Module, recipe: Recipe, rows: Sequence[Any], micro_batch: Rows | Tokens) -> float:
    """Return the loss of some rows, each target counted once.

    Args:
        model: In the mode that is wanted.
        recipe: Says what the loss is.
        rows: Any number of them.
        micro_batch: How many rows at once.

    Returns:
        The sum of the loss over all targets divided by their number; NaN where there is no target.
    """
    device = input_device(model)
    batch = LogicalBatch(rows, collate=recipe.collate)
    loss_sum = counted = 0.0
    for places in _cut(batch, recipe, micro_batch):
        part = move(batch.take(places), device)
        result = recipe.loss(model, part)
        if result is None:
            continue
        if isinstance(result, tuple):
            part_sum, targets = float(result[0]), float(result[1])
        else:
            targets = float(recipe.targets(part)) if recipe.targets is not None else len(places)
            part_sum = float(result) * (targets if recipe.reduction == "mean" else 1)
        if targets > 0:  # the mean over no target is not a number, and adds nothing
            loss_sum += part_sum
            counted += targets
    return loss_sum / counted if counted > 0 else float("nan")


def _cut(batch: LogicalBatch, recipe: Recipe, micro_batch: Rows | Tokens) -> list[Indices]:
    if isinstance(micro_batch, Tokens):
        return micro_batch.cut(batch.lengths(micro_batch.length))
    cut = micro_batch.cut(batch.rows)
    if recipe.length is None:
        return cut
    lengths = batch.lengths(recipe.length)
    by_length = sorted(range(batch.rows), key=lambda row: -lengths[row])
    return [[by_length[place] for place in places] for places in cut]


def _numbers(measures: Any, recipe: Recipe) -> dict[str, float]:
    try:
        return {str(name): float(value) for name, value in measures.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"`measure` of {recipe.name} returned {measures!r:.200}, not a dict of names and numbers.",
            hint='return numbers by name, as in {"accuracy": right / len(rows)}.',
        ) from error
