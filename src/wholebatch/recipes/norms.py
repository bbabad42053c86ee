"""What is done about batch norm in the model of a recipe?"""

import inspect
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from wholebatch.core.errors import ConfigError
from wholebatch.engine.batchnorm import convert_batch_norm, freeze_batch_norm
from wholebatch.engine.meetings.exactnorm import exact_batch_norm
from wholebatch.recipes.config import BatchNormChoice
from wholebatch.recipes.protocol import Recipe


def made(recipe: Recipe, choice: BatchNormChoice) -> Any:
    """Return what ``model()`` of a recipe returns; one that has an argument ``batch_norm`` is told the choice.

    Args:
        recipe: Whose.
        choice: ``"refuse"`` is nobody's choice, and is not told.
    """
    if choice != "refuse" and _is_told(recipe):
        return recipe.model(batch_norm=choice)  # type: ignore[call-arg]
    return recipe.model()


def treated(model: nn.Module, recipe: Recipe, choice: BatchNormChoice) -> nn.Module:
    """Return the model with its batch norm as it was chosen; ``"refuse"`` and ``"per_micro_batch"`` change nothing.

    Args:
        model: Of the recipe; changed in place.
        recipe: Whose.
        choice: What to do.

    Raises:
        ConfigError: There is no batch norm in the model, so that the choice says nothing.

    Example:
        >>> from wholebatch.recipes.finding import find_recipe
        >>> images = find_recipe("images")
        >>> type(treated(made(images, "exact"), images, "exact")[1]).__name__
        'ExactBatchNorm2d'
    """
    if choice == "refuse":
        return model
    if not any(isinstance(layer, _BatchNorm) for layer in model.modules()):
        if _is_told(recipe):  # it has seen to it itself
            return model
        raise ConfigError(
            f"`batch_norm` is {choice!r}, and the model of {recipe.name} has no batch norm.",
            hint="leave it out, or give `model` an argument batch_norm that says what to build.",
        )
    if choice == "exact":
        return exact_batch_norm(model)
    if choice == "frozen":
        return freeze_batch_norm(model)
    return convert_batch_norm(model, to="group") if choice == "group" else model


def _is_told(recipe: Recipe) -> bool:
    try:
        return "batch_norm" in inspect.signature(recipe.model).parameters
    except (TypeError, ValueError):  # some built-in functions do not tell theirs
        return False
