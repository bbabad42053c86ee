"""Do the rows of a batch add up? If not, they see each other, and no cut is exact."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras

from wholebatch.core.errors import LossError, MeetingError
from wholebatch.integrations.keras.cutting import num_rows, rows_of
from wholebatch.integrations.keras.moving import is_seed

ROWS = 4
"""Compared with two halves of them: a batch of one row is special to much code."""


def check_rows(model: Any, data: Any, measured: Callable[[Any, bool], Sequence[Any]]) -> None:
    """Compare the sums of a few rows with those of their halves, once after ``compile``.

    Args:
        model: The model around.
        data: ``(x, y, sample_weight)``, of which the first rows are taken.
        measured: Takes some rows and whether to be in training, and returns the sum of each loss, and last what
            ``add_loss`` was given, times the rows where that is a mean: all are to add up over rows.

    Raises:
        MeetingError: A loss does not add up.
        LossError: What ``add_loss`` was given does not.
    """
    if model.checked:
        return
    model.checked = True
    if not model.check_first or num_rows(data) < ROWS or _is_exempt(model):
        return
    # With dropout two passes differ anyway; without a random layer, training is what is to be compared.
    training = not any(is_seed(variable) for variable in model.non_trainable_variables)
    whole, first, second = (
        [float(value) for value in measured(rows_of(data, start, stop), training)]
        for start, stop in ((0, ROWS), (0, ROWS // 2), (ROWS // 2, ROWS))
    )
    halves = [a + b for a, b in zip(first, second, strict=True)]
    *losses, terms = (_adds_up(*each, tolerance=_tolerance(model)) for each in zip(whole, first, second, strict=True))
    if not all(losses):
        place = losses.index(False)
        raise MeetingError(
            f"The loss of {ROWS} rows adds up to {whole[place]:.6g}, and that of their halves to {halves[place]:.6g}: "
            "rows see each other, in the model or in the loss, so that a cut batch trains otherwise.",
            hint="give each row an output and a loss of its own; train on undivided batches; or switch this comparison "
            "off with check=None if you know better.",
        )
    if not terms:
        other = "sum" if model.add_loss_is == "mean" else "mean"
        raise LossError(
            f"What add_loss was given in a layer is no {model.add_loss_is} over rows: {ROWS} of them and their halves "
            "do not agree.",
            hint=f"say add_loss={other!r} if it is that; check=None switches this comparison off.",
        )


def _is_exempt(model: Any) -> bool:
    """Return whether rows are known to see each other, or no other number of them fits."""
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    fixed = any(each.shape[0] is not None for each in getattr(model.model, "inputs", None) or [] if len(each.shape))
    return fixed or model.batch_norm != "refuse" or any(layer.trainable for layer in norms)


def _adds_up(whole: float, first: float, second: float, *, tolerance: float) -> bool:
    size = abs(whole) + abs(first) + abs(second)
    return not math.isfinite(size) or abs(whole - first - second) <= tolerance * size


def _tolerance(model: Any) -> float:
    """Return what is certainly more than rounding."""
    narrow = any(layer.compute_dtype in ("float16", "bfloat16") for layer in model._flatten_layers())
    return 0.05 if narrow else 1e-3
