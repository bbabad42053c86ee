"""What does a Keras loss divide by?

`keras.losses.Loss` multiplies the losses of positions by weights and masks, adds them up and divides: by the number of
positions ("sum_over_batch_size", whatever the weights), by those that a mask leaves, by the sum of the weights
("mean_with_sample_weight"), or by nothing ("sum"). Here sum and divisor are told apart, so that the sum of a
micro-batch can be divided by what the undivided batch is divided by.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops
from keras.src.backend import get_keras_mask  # where the array takes no attribute, as in JAX, it is kept elsewhere

from wholebatch.core.errors import LossError


class Divided:
    """One loss of ``compile``, divided by what it is told.

    Args:
        loss: A `keras.losses.Loss`.

    Attributes:
        divisor: What the sum is divided by; None: by its own count.
        value: The last value that was returned.
        total: The last sum.
        count: What Keras would have divided the last sum by; None where it divides by nothing.
        by_rows: Whether that count is the same for each row: there is neither a mask nor a weight in it.
        masked: Whether the predictions had a mask.
        positions: How many losses were added up, with those that a mask leaves out.
    """

    def __init__(self, loss: Any) -> None:
        _refuse(loss)
        self._loss = loss
        self.divisor: Any = None
        self.value: Any = None
        self.total: Any = None
        self.count: Any = None
        self.by_rows = True
        self.masked = False
        self.positions = 0

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Return the sum of the losses divided by `divisor`; a scalar."""
        self.total, self.count = self._parts(y_true, y_pred, sample_weight)
        divisor = self.count if self.divisor is None else self.divisor
        if self.count is None:
            self.value = self.total
        else:
            self.value = ops.divide_no_nan(self.total, ops.cast(divisor, self.total.dtype))
        return self.value

    def _parts(self, y_true: Any, y_pred: Any, sample_weight: Any) -> tuple[Any, Any]:
        loss = self._loss
        before = get_keras_mask(y_pred)
        y_pred = ops.convert_to_tensor(y_pred, dtype=loss.dtype)
        values = loss.call(ops.convert_to_tensor(y_true, dtype=loss.dtype), y_pred)
        after = get_keras_mask(values)
        masks = [ops.cast(mask, "bool") for mask in (before, after) if mask is not None]
        values = ops.convert_to_tensor(values, dtype=loss.dtype)
        self._check(values)
        mask = ops.cast(masks[0] & masks[-1], values.dtype) if masks else None
        weights = mask
        if sample_weight is not None:
            weights = ops.convert_to_tensor(sample_weight, dtype=values.dtype)
            if mask is not None:
                mask, weights = _same_rank(mask, weights)
                weights = weights * mask
        if weights is not None:
            values, weights = _same_rank(values, weights)
            values = values * weights
        total = ops.sum(values)
        self.masked = before is not None
        self.by_rows = mask is None and (loss.reduction != "mean_with_sample_weight" or weights is None)
        if loss.reduction == "sum":
            self.by_rows = True
            return total, None
        self.positions = _size(values)
        positions = ops.cast(self.positions, total.dtype)
        if loss.reduction == "mean_with_sample_weight" and weights is not None:
            return total, ops.sum(weights)
        if mask is not None:
            return total, ops.sum(mask) * (positions / _size(mask))
        return total, positions

    def _check(self, values: Any) -> None:
        if len(values.shape) == 0:
            raise LossError(
                f"The loss {self._loss.name} returned one number for all rows, and what that number is divided by "
                "cannot be seen.",
                hint="return one number for each row, such as keras.ops.mean(..., axis=-1): Keras takes their mean.",
            )


def _refuse(loss: Any) -> None:
    """Refuse losses of which the parts cannot be told, or whose rows are compared with each other."""
    if loss.reduction in (None, "none"):
        raise LossError(
            f"The loss {loss.name} has the reduction {loss.reduction!r}, so that nothing makes a number of it.",
            hint="give it one of 'sum_over_batch_size', 'mean_with_sample_weight' and 'sum'.",
        )
    if type(loss).__call__ is not keras.losses.Loss.__call__:
        raise LossError(
            f"The loss {loss.name} reduces in a __call__ of its own, so that its sum and its divisor cannot be told "
            "apart.",
            hint="override call(y_true, y_pred) instead, and return one number for each row.",
        )
    if isinstance(loss, keras.losses.Circle):
        raise LossError(
            f"The loss {loss.name} compares the rows of a batch with each other, and a micro-batch has only some.",
            hint="train it on undivided batches, or in PyTorch with wb.gather, through which micro-batches meet.",
        )


@contextmanager
def divided(compile_loss: Any) -> Iterator[list[Divided]]:
    """Yield the losses of ``compile``, each told apart, in their places; afterwards they are as they were."""
    if compile_loss is None:
        yield []
        return
    kept = compile_loss._flat_losses
    losses = [Divided(each.loss) for each in kept]
    compile_loss._flat_losses = [each._replace(loss=loss) for each, loss in zip(kept, losses, strict=True)]
    try:
        yield losses
    finally:
        compile_loss._flat_losses = kept


def _size(values: Any) -> int:
    size = 1
    for length in values.shape:
        size *= int(length)
    return size


def _same_rank(values: Any, weights: Any) -> tuple[Any, Any]:
    """Return both in one rank where one has a last dimension of 1 more than the other, as Keras does."""
    ranks = len(values.shape), len(weights.shape)
    if ranks[0] == ranks[1] + 1 and values.shape[-1] == 1:
        return (values, ops.expand_dims(weights, -1)) if ranks[1] == 1 else (ops.squeeze(values, -1), weights)
    if ranks[1] == ranks[0] + 1 and weights.shape[-1] == 1:
        return (ops.expand_dims(values, -1), weights) if ranks[0] == 1 else (values, ops.squeeze(weights, -1))
    return values, weights
