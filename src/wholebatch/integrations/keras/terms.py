"""How do the parts of a loss, each with a divisor of its own, and the terms beside it make one number?"""

from typing import Any

from keras import ops

from wholebatch.core.errors import LossError


def contribution(model: Any, losses: list[Any], data: tuple[Any, Any, Any], y_pred: Any, share: Any, terms: Any) -> Any:
    """Return what a micro-batch adds to the loss of its logical batch.

    Args:
        model: The compiled model, with `losses` in place.
        losses: Its losses, told apart, each with its divisor.
        data: x, y and sample_weight of the micro-batch.
        y_pred: What the model said.
        share: The rows of the micro-batch, as a part of those of the logical batch.
        terms: ``model.losses`` of this pass: of ``add_loss`` first, then of the regularizers.

    Returns:
        A scalar.
    """
    _, y, sample_weight = data
    main = [model._compile_loss(y, y_pred, sample_weight)] if losses else []
    penalties = len(model._get_regularization_losses())
    added = [model._aggregate_additional_loss(term) for term in terms]
    own = added[: len(added) - penalties]
    weight = share if model.add_loss_is == "mean" else 1
    parts = [*main, *(term * weight for term in own), *(term * share for term in added[len(own) :])]
    if not parts:
        raise LossError("There is nothing to train on.", hint="give a loss to compile, or add_loss to a layer.")
    return parts[0] if len(parts) == 1 else ops.sum(parts)


def report(model: Any, values: list[Any], loss: Any, rows: int) -> Any:
    """Tell the trackers of ``fit`` the loss of the logical batch, and of each output; return all metrics."""
    trackers = model._compile_loss.metrics if model._compile_loss is not None else []
    for tracker, value in zip(trackers, values, strict=False):
        tracker.update_state(value, sample_weight=rows)
    model._loss_tracker.update_state(loss, sample_weight=rows)
    return model.get_metrics_result()


def kept(model: Any) -> list[tuple[Any, Any]]:
    """Return the state of the trackers of outputs, which each call of the loss would move."""
    trackers = model._compile_loss.metrics if model._compile_loss is not None else []
    return [(variable, ops.copy(variable.value)) for tracker in trackers for variable in tracker.variables]
