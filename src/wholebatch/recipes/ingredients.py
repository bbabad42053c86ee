"""What goes into a run? The rows, model and optimizer of a recipe, looked at before anything trains on them."""

import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from wholebatch.core.errors import ConfigError
from wholebatch.core.split import Rows, Tokens
from wholebatch.recipes.amount import Amount
from wholebatch.recipes.config import BatchNormChoice
from wholebatch.recipes.norms import made, treated
from wholebatch.recipes.protocol import Recipe


def seed_everything(seed: int) -> None:
    """Seed Python, PyTorch and, where it is in use, NumPy.

    Args:
        seed: 0 or more, below 2**32.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def rows_of(recipe: Recipe, split: Literal["train", "validation"]) -> Sequence[Any]:
    """Return the rows of a split.

    Raises:
        ConfigError: They are no sequence, or there is nothing to train on.
    """
    rows = recipe.data(split)
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__") or isinstance(rows, Mapping):
        raise ConfigError(
            f"data({split!r}) of {recipe.name} returned a {type(rows).__name__}, not a sequence of rows.",
            hint="return a list of rows, or a map-style dataset; for no validation, an empty list.",
        )
    if split == "train" and len(rows) == 0:
        raise ConfigError(f"data('train') of {recipe.name} returned no rows.", hint="return the rows to learn from.")
    return rows


def model_of(recipe: Recipe, batch_norm: BatchNormChoice = "refuse") -> nn.Module:
    """Return the model in training mode, on the accelerator where there is one.

    Args:
        recipe: Whose.
        batch_norm: What is done about its batch norm.

    Raises:
        ConfigError: It is no module, has nothing that learns, or no batch norm where something is to be done about it.
    """
    model = made(recipe, batch_norm)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model() of {recipe.name} returned a {type(model).__name__}, not a torch.nn.Module.",
            hint="return the module to train.",
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"The model of {recipe.name} has no parameter that learns.",
            hint="return a module with parameters, and leave requires_grad on for those that shall learn.",
        )
    model = treated(model, recipe, batch_norm)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model.train()


def optimizer_of(recipe: Recipe, model: nn.Module, lr: float | None) -> Optimizer:
    """Return the recipe's optimizer, or AdamW.

    Args:
        recipe: Whose.
        model: What it steps.
        lr: A learning rate that was stated for the run, given to every parameter group; None: the optimizer's own.
    """
    if recipe.optimizer is None:
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(learning, lr=lr if lr is not None else 1e-3)
    optimizer: Optimizer = recipe.optimizer(model)
    if lr is not None and isinstance(optimizer, Optimizer):  # else the accumulator says what it is
        for group in optimizer.param_groups:
            group["lr"] = lr
    return optimizer


def cut_of(recipe: Recipe, amount: Amount) -> Rows | Tokens:
    """Return micro-batches of this amount.

    Raises:
        ConfigError: It is in tokens, and the recipe does not say how long a row is.

    Example:
        >>> from wholebatch.recipes.finding import find_recipe
        >>> print(cut_of(find_recipe("text"), Amount(4096, "tokens")))
        4096 tokens
    """
    if amount.unit == "rows":
        return Rows(amount.count)
    if recipe.length is None:
        raise no_length(recipe, f"An amount of {amount}")
    return Tokens(amount.count, length=recipe.length)


def no_length(recipe: Recipe, what: str) -> ConfigError:
    """Return the error of asking for tokens where rows have no length."""
    return ConfigError(
        f"{what} was asked for, but the recipe {recipe.name} does not say how many tokens a row has.",
        hint=f"state it in rows, as in '16 rows', or give {recipe.name} a function length(row).",
    )
