"""What is a recipe? Four functions that must be there, and what may be said beyond them."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from wholebatch.core.errors import ConfigError, WeightError
from wholebatch.core.weights import Reduction, check_reduction

# What each function is called with, in the words of the protocol.
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "data": ("split",),
    "model": (),
    "collate": ("rows",),
    "loss": ("model", "micro_batch"),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "targets": ("micro_batch",),
    "length": ("row",),
    "optimizer": ("model",),
    "measure": ("model", "rows"),
    "step": ("model", "optimizer", "micro_batches"),
}


class RecipeLike(Protocol):
    """What somebody writes to have it trained. No base class is needed, only these four functions.

    Optional, beside them:

    - ``targets(micro_batch)``: counts what `loss` averages over; default: the rows. Not together with a loss that
      returns its targets.
    - ``reduction``: ``"mean"`` (default) or ``"sum"``, what a loss that stands alone is.
    - ``length(row)``: the tokens of a row. Then rows are sorted by length, and logical batches and micro-batches may be
      stated in tokens.
    - ``optimizer(model)``: default: AdamW over all parameters. A learning rate that is stated for the run is given to
      every parameter group.
    - ``measure(model, rows)``: what to say about the validation rows beyond the loss, as a dict of names and numbers.
      The final line quotes the first.
    - ``step(model, optimizer, micro_batches)``: a loop of your own, from a list of micro-batches to an update; an
      argument with ``sched`` in its name is given a schedule. ``wholebatch verify`` judges it in place of the
      accumulator; ``wholebatch train`` does not need it.
    - ``model`` may have an argument ``batch_norm``: it is told what was chosen with ``--batch-norm``, if anything was.
      Whatever batch norm is in the model that it returns is then treated as chosen.
    - ``defaults``: a dict with the keys of a configuration file.

    Example:
        >>> import torch
        >>> class Line:
        ...     def data(self, split):
        ...         return [(x / 10, 2 * x / 10) for x in range(10)]
        ...     def model(self):
        ...         return torch.nn.Linear(1, 1)
        ...     def collate(self, rows):
        ...         return torch.tensor(rows)
        ...     def loss(self, model, micro_batch):
        ...         x, y = micro_batch[:, :1], micro_batch[:, 1:]
        ...         return torch.nn.functional.mse_loss(model(x), y)
        >>> Recipe.of(Line(), "line").reduction
        'mean'
    """

    def data(self, split: str) -> Sequence[Any]:
        """Return the rows of ``"train"`` or ``"validation"``; the latter may be empty, then nothing is validated."""
        ...

    def model(self) -> Any:
        """Return the `torch.nn.Module` to train. The random state is seeded before."""
        ...

    def collate(self, rows: list[Any]) -> Any:
        """Return a micro-batch: any pytree of tensors that `loss` understands. Rows may come in any number."""
        ...

    def loss(self, model: Any, micro_batch: Any) -> Any:
        """Return the mean loss of a micro-batch over its targets, or ``(loss_sum, targets)``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A recipe that was looked at: its functions, and a value for everything that it left out.

    Attributes:
        name: What it was asked for by.
        data: Rows by split.
        model: Makes the model.
        collate: Rows to micro-batch.
        loss: The objective.
        targets: Counts targets, or None for rows.
        reduction: What a loss that stands alone is.
        length: Tokens of a row, or None where rows have no length.
        optimizer: Makes the optimizer, or None for AdamW.
        measure: Measures of the validation rows, or None.
        step: The loop that is to be verified, or None for the accumulator's.
        defaults: Configuration by key.
    """

    name: str
    data: Callable[[str], Sequence[Any]]
    model: Callable[[], Any]
    collate: Callable[[list[Any]], Any]
    loss: Callable[[Any, Any], Any]
    targets: Callable[[Any], Any] | None = None
    reduction: Reduction = "mean"
    length: Callable[[Any], int] | None = None
    optimizer: Callable[[Any], Any] | None = None
    measure: Callable[[Any, Sequence[Any]], Mapping[str, float]] | None = None
    step: Callable[..., Any] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, thing: Any, name: str) -> "Recipe":
        """Look at what was given as a recipe.

        Args:
            thing: A module, an instance, a namespace.
            name: What it was asked for by; errors say it.

        Returns:
            The recipe.

        Raises:
            ConfigError: A function is missing, cannot be called, or takes other arguments; `defaults` is not a dict, or
                `reduction` is not one of the two.
        """
        for function, arguments in FUNCTIONS.items():
            if not hasattr(thing, function):
                raise _missing(thing, name, function)
            _check(getattr(thing, function), name, function, arguments)
        optional = {function: getattr(thing, function, None) for function in OPTIONAL}
        for function, value in optional.items():
            if value is not None:
                _check(value, name, function, OPTIONAL[function])
        defaults = getattr(thing, "defaults", {})
        if not isinstance(defaults, Mapping):
            raise ConfigError(
                f"`defaults` of {name} is a {type(defaults).__name__}, not a dict.",
                hint='write it like a configuration file, as in defaults = {"logical_batch": "512 rows"}.',
            )
        try:
            reduction = check_reduction(getattr(thing, "reduction", "mean"))
        except WeightError as error:
            raise ConfigError(f"In {name}: {error.found}", hint=error.hint) from error
        required = {function: getattr(thing, function) for function in FUNCTIONS}
        functions: dict[str, Any] = required | optional
        return cls(name=name, reduction=reduction, defaults=dict(defaults), **functions)


def _missing(thing: Any, name: str, function: str) -> ConfigError:
    there = [attribute for attribute in dir(thing) if not attribute.startswith("_")]
    nearest = difflib.get_close_matches(function, there, n=1)
    form = f"{function}({', '.join(FUNCTIONS[function])})"
    return ConfigError(
        f"The recipe {name} has no `{function}`.",
        hint=(f"rename `{nearest[0]}` to `{function}`; " if nearest else f"add a function {form}; ")
        + "a recipe has data(split), model(), collate(rows) and loss(model, micro_batch).",
    )


def _check(function: Any, name: str, what: str, arguments: tuple[str, ...]) -> None:
    form = f"{what}({', '.join(arguments)})"
    if not callable(function):
        raise ConfigError(
            f"`{what}` of {name} is a {type(function).__name__}, which cannot be called.",
            hint=f"make it a function {form}.",
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions do not tell theirs
        return
    schedules = [each for each in signature.parameters if what == "step" and "sched" in each.lower()]
    try:
        signature.bind(*arguments, **dict.fromkeys(schedules[:1]))
    except TypeError as error:
        raise ConfigError(
            f"`{what}` of {name} cannot be called as {form}: {error}.",
            hint=f"write it as def {form}, or with a self before that in a class.",
        ) from error
