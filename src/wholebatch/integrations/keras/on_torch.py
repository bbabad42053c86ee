"""How does a train step on PyTorch go through a logical batch?"""

from typing import Any

import keras
import torch
from keras import ops

from wholebatch.integrations.keras.cutting import Held, Sliced, num_rows
from wholebatch.integrations.keras.dividing import Divided, divided
from wholebatch.integrations.keras.moving import is_seed, refuse_moved
from wholebatch.integrations.keras.terms import contribution, kept, report


def step(model: Any, batch: Sliced | Held) -> Any:
    """Make the update of a logical batch, and return the metrics."""
    weights = model.trainable_variables[:]
    sums = Sums(weights)
    model.zero_grad()
    with divided(model._compile_loss) as losses:
        trackers = kept(model)
        values = [0.0] * len(losses)
        loss: Any = 0.0
        for number, part in enumerate(batch):
            y_pred = _examined(model, part[0])
            terms = model.losses
            if number == 0:
                with torch.no_grad():
                    _set_divisors(model, losses, batch, y_pred)
            both = contribution(model, losses, part, y_pred, num_rows(part) / batch.rows, terms)
            values = [old + each.value.detach() for old, each in zip(values, losses, strict=True)]
            loss = loss + both.detach()
            if weights:
                model.optimizer.scale_loss(both).backward()
                sums.fold()
            with torch.no_grad():
                model.compute_metrics(*part[:2], y_pred, sample_weight=part[2])
            del y_pred, terms, both
        with torch.no_grad():
            for variable, value in trackers:
                variable.assign(value)
            if weights and not _empty(losses):
                model.optimizer.apply(sums.gradients(), weights)
            return report(model, values, loss, batch.rows)


def guarded(model: Any) -> Any:
    """Return what ``fit`` calls; a refusal leaves the model as it was anyway."""
    return model.train_function


def stepping(model: Any) -> Any:
    """Return what ``fit`` calls with each batch of its data, where a model holds them until a window is full."""

    window = model.window

    def train_function(data: Any) -> Any:
        full = window.take(keras.utils.unpack_x_y_sample_weight(data[0]), model.micro_batches)
        if full is not None:
            window.logs = step(model, full)
        return model.get_metrics_result() if window.logs is None else window.logs

    return train_function


def close(model: Any) -> None:
    """Make the update of a window that is not full."""
    model.window.logs = step(model, model.window.closed())


def _set_divisors(model: Any, losses: list[Divided], batch: Sliced | Held, y_pred: Any) -> None:
    """Find what each loss of the logical batch is divided by, when the first micro-batch has gone forward.

    Where masks or weights are in it, they are counted in the other micro-batches as well: on predictions of zeros, or,
    where the layers have made a mask or the shapes differ, by going forward once more.
    """
    if not losses:
        return
    first, *others = batch
    model._compile_loss(first[1], y_pred, first[2])
    counts = [loss.count for loss in losses]
    if batch.alike and all(loss.by_rows for loss in losses):
        counts = [loss.positions * batch.rows / num_rows(first) for loss in losses]
        others = []
    forward = not batch.alike or any(loss.masked for loss in losses)
    for part in others:
        said = model(part[0], training=False) if forward else _zeros(y_pred, num_rows(part))
        model._compile_loss(part[1], said, part[2])
        counts = [
            None if loss.count is None else count + loss.count for count, loss in zip(counts, losses, strict=True)
        ]
    for loss, count in zip(losses, counts, strict=True):
        loss.divisor = count


def _zeros(y_pred: Any, rows: int) -> Any:
    return keras.tree.map_structure(lambda leaf: leaf.new_zeros(rows, *leaf.shape[1:]), y_pred)


def _empty(losses: list[Divided]) -> bool:
    """Return whether there is nothing to learn: every loss is a mean over no target."""
    return bool(losses) and all(loss.count is not None and not bool(loss.divisor) for loss in losses)


def _examined(model: Any, x: Any) -> Any:
    """Return the predictions, and have a look, once, at what a pass does beside them."""
    if model.examined:
        return model(x, training=True)
    before = [(each, ops.copy(each.value)) for each in model.non_trainable_variables if not is_seed(each)]
    y_pred = model(x, training=True)
    moved = [variable for variable, value in before if not torch.equal(variable.value, value)]
    if model.batch_norm == "refuse" and moved:
        with torch.no_grad():
            for variable, value in before:
                variable.assign(value)
        refuse_moved(model, moved)
    model.examined = True
    return y_pred


class Sums:
    """The running sums of gradients: PyTorch's own, and wider ones for weights in 16 bits."""

    def __init__(self, weights: list[Any]) -> None:
        self._weights = [weight.value for weight in weights]
        self._wide: dict[int, torch.Tensor] = {}

    def fold(self) -> None:
        """Take what a backward pass has left in 16 bits."""
        for place, weight in enumerate(self._weights):
            if weight.grad is not None and weight.grad.dtype in (torch.float16, torch.bfloat16):
                gradient = weight.grad.float()
                self._wide[place] = self._wide[place].add_(gradient) if place in self._wide else gradient
                weight.grad = None

    def gradients(self) -> list[Any]:
        """Return the sums, each in the dtype of its weight."""
        return [
            self._wide[place].to(weight.dtype) if place in self._wide else weight.grad
            for place, weight in enumerate(self._weights)
        ]
