"""How does a train step on JAX go through a logical batch? In one scan, so that it compiles to the memory of a part."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax import lax

from wholebatch.core.errors import WholeBatchError
from wholebatch.integrations.keras.cutting import Held, Sliced, num_rows, rows_of, shapes
from wholebatch.integrations.keras.dividing import Divided, divided
from wholebatch.integrations.keras.moving import is_seed, refuse_moved
from wholebatch.integrations.keras.terms import contribution, report


def step(model: Any, state: Any, batch: Sliced | Held) -> Any:
    """Return the metrics, and the state after the update of a logical batch."""
    trainable, fixed, optimizing, metrics = state
    with divided(model._compile_loss) as losses:
        a_pass = Pass(model, losses, optimizing, metrics)
        counted = _set_divisors(a_pass, trainable, fixed, batch)

        def add(carried: Any, part: Any) -> Any:
            grads, fixed, metrics, values, loss = carried
            share = num_rows(part) / batch.rows
            new, (fixed, metrics, more, both) = a_pass.gradient(trainable, fixed, metrics, part, share)
            grads = [old + each.astype(old.dtype) for old, each in zip(grads, new, strict=True)]
            return grads, fixed, metrics, [old + each for old, each in zip(values, more, strict=True)], loss + both

        zero = jnp.zeros((), keras.config.floatx())
        grads = [jnp.zeros(each.shape, jnp.promote_types(each.dtype, jnp.float32)) for each in trainable]
        carried = _through(batch, (grads, fixed, metrics, [zero] * len(losses), zero), add)
    grads, fixed, metrics, values, loss = carried
    grads = [grad.astype(each.dtype) for grad, each in zip(grads, trainable, strict=True)]

    def apply() -> Any:
        return model.optimizer.stateless_apply(optimizing, grads, trainable)

    if counted is None:
        trainable, optimizing = apply()
    else:  # a window without a target is no update
        trainable, optimizing = lax.cond(counted, apply, lambda: (list(trainable), list(optimizing)))
    with keras.StatelessScope(list(zip(model.metrics_variables, metrics, strict=True))) as scope:
        logs = report(model, values, loss, batch.rows)
    metrics = [scope.get_current_value(variable) for variable in model.metrics_variables]
    return logs, (trainable, fixed, optimizing, metrics)


STATE = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")


def guarded(model: Any) -> Any:
    """Return what ``fit`` calls, so that a refusal leaves the model as it was: Keras has emptied its variables by then,
    and knows no state yet from which to fill them.
    """
    train_function = model.train_function

    def train_or_give_back(state: Any, iterator: Any) -> Any:
        try:
            return train_function(state, iterator)
        except WholeBatchError:
            _give_back(model, state)
            raise

    return train_or_give_back


def _give_back(model: Any, state: Any) -> None:
    model._jax_state = dict(zip(STATE, state, strict=True))
    model._jax_state_synced = False
    model.jax_state_sync()


def stepping(model: Any) -> Any:
    """Return what ``fit`` calls with its state and its data, where a model holds them until a window is full."""
    window = model.window

    def held(state: Any, parts: Any) -> Any:
        return step(model, state, Held(parts))

    window.compiled = jax.jit(held, donate_argnums=0) if model.jit_compile and not model.run_eagerly else held

    def train_function(state: Any, iterator: Any) -> Any:
        full = window.take(keras.utils.unpack_x_y_sample_weight(next(iterator)), model.micro_batches)
        if full is not None:
            window.logs, state = window.compiled(state, full.parts)
        elif window.logs is None:
            with keras.StatelessScope(list(zip(model.metrics_variables, state[3], strict=True))):
                return model.get_metrics_result(), state
        return window.logs, state

    return train_function


def close(model: Any) -> None:
    """Make the update of a window that is not full."""
    model.jax_state_sync()
    state = model._get_jax_state(**dict.fromkeys(STATE, True), purge_model_variables=True)
    try:
        model.window.logs, state = model.window.compiled(state, model.window.closed().parts)
    finally:
        _give_back(model, state)


def _through(batch: Sliced | Held, carried: Any, add: Any) -> Any:
    """Return what is carried through all micro-batches: those that are alike in one scan."""
    if isinstance(batch, Sliced):
        full, left = divmod(batch.rows, batch.micro_batch)

        def body(carried: Any, number: Any) -> tuple[Any, None]:
            return add(carried, _slice(batch.data, number * batch.micro_batch, batch.micro_batch)), None

        carried, _ = lax.scan(body, carried, jnp.arange(full))
        return add(carried, rows_of(batch.data, full * batch.micro_batch, None)) if left else carried
    for _, alike in itertools.groupby(batch, key=shapes):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alike)
        carried, _ = lax.scan(lambda carried, part: (add(carried, part), None), carried, stacked)
    return carried


def _slice(data: Any, start: Any, rows: int) -> Any:
    return keras.tree.map_structure(
        lambda leaf: None if leaf is None else lax.dynamic_slice_in_dim(jnp.asarray(leaf), start, rows), data
    )


def _set_divisors(a_pass: "Pass", trainable: Any, fixed: Any, batch: Sliced | Held) -> Any:
    """Find what each loss of the logical batch is divided by; return whether it is more than zero, or None where it is.

    Where masks or weights are in it, they are counted in a scan of its own. Only the counts of its passes are used:
    compiled, it computes nothing else.
    """
    losses = a_pass.losses
    if not losses:
        return None
    first = next(iter(batch))
    jax.eval_shape(lambda: a_pass.counts(trainable, fixed, first))
    if batch.alike and all(loss.by_rows for loss in losses):
        for loss in losses:
            loss.divisor = loss.positions * batch.rows / num_rows(first)
        return None
    divides = [loss.count is not None for loss in losses]

    def add(sums: Any, part: Any) -> Any:
        return [old + new for old, new in zip(sums, a_pass.counts(trainable, fixed, part), strict=True)]

    sums = _through(batch, [jnp.zeros((), keras.config.floatx())] * len(losses), add)
    for loss, count in zip(losses, sums, strict=True):
        loss.divisor = count
    return jnp.any(jnp.stack(sums) != 0) if all(divides) else None


class Pass:
    """A micro-batch, forward and backward, with nothing left behind."""

    def __init__(self, model: Any, losses: list[Divided], optimizing: Any, metrics: Any) -> None:
        self._model, self.losses = model, losses
        self._optimizing = list(zip(model.optimizer.variables, optimizing, strict=True))
        # A call of the loss moves the trackers of the outputs; what it makes of them is not kept.
        self._trackers = list(zip(model.metrics_variables, metrics, strict=True))

    def counts(self, trainable: Any, fixed: Any, part: Any) -> list[Any]:
        """Return what the losses of these rows would be divided by."""
        y_pred, _, _ = self._forward(trainable, fixed, part)
        with self._scope(trainable, fixed):
            self._model._compile_loss(part[1], y_pred, part[2])
        zero = jnp.zeros((), keras.config.floatx())
        return [zero if loss.count is None else loss.count.astype(zero.dtype) for loss in self.losses]

    def gradient(self, trainable: Any, fixed: Any, metrics: Any, part: Any, share: Any) -> Any:
        """Return the gradient of what these rows add to the loss; the states, the loss of each output, and the loss."""

        def scaled(trainable: Any) -> Any:
            y_pred, moved, terms = self._forward(trainable, fixed, part)
            with self._scope(trainable, moved):
                both = contribution(self._model, self.losses, part, y_pred, share, terms)
            with keras.StatelessScope(self._optimizing):
                return self._model.optimizer.scale_loss(both), (
                    y_pred,
                    moved,
                    [loss.value for loss in self.losses],
                    both,
                )

        (_, (y_pred, moved, values, both)), grads = jax.value_and_grad(scaled, has_aux=True)(trainable)
        # As in Keras on JAX, the metrics see predictions that carry no mask any more.
        return grads, (moved, self._measured(metrics, part, y_pred), values, both)

    def _forward(self, trainable: Any, fixed: Any, part: Any) -> Any:
        model = self._model
        y_pred, moved, terms = model.stateless_call(trainable, fixed, part[0], return_losses=True, training=True)
        if model.batch_norm == "refuse":
            states = zip(model.non_trainable_variables, fixed, moved, strict=True)
            refuse_moved(model, [variable for variable, old, new in states if new is not old and not is_seed(variable)])
        return y_pred, moved, terms

    def _scope(self, trainable: Any, fixed: Any) -> Any:
        model = self._model
        return keras.StatelessScope(
            [
                *zip(model.trainable_variables, trainable, strict=True),
                *zip(model.non_trainable_variables, fixed, strict=True),
                *self._trackers,
            ]
        )

    def _measured(self, metrics: Any, part: Any, y_pred: Any) -> list[Any]:
        variables = self._model.metrics_variables
        with keras.StatelessScope(list(zip(variables, metrics, strict=True))) as scope:
            self._model.compute_metrics(*part[:2], y_pred, sample_weight=part[2])
        return [scope.get_current_value(variable) for variable in variables]
