"""What can an optimizer do about windows, which sees gradients and not what they are of?"""

from collections.abc import Iterable
from typing import Any

import keras
from keras import ops

from wholebatch.core.errors import OptimizerError


@keras.saving.register_keras_serializable(package="wholebatch")
class GradientAccumulateOptimizer(keras.optimizers.Optimizer):
    """An optimizer around an optimizer that makes one update of ``accum_steps`` gradients.

    Each gradient is taken for that of a mean over as many targets as any other, unless a call of `apply` says how many:
    ``apply(grads, weights, targets=n)``, in a loop of one's own. Then the update is that of the undivided batch. In
    ``fit`` nobody says it, so that there it is exact where all micro-batches have as many targets, without masks and
    with sizes that divide the data; `ExactWindows` is exact for all others.

    A window that the data leave open is closed where ``steps_per_epoch`` says so, or at the end of each epoch with the
    callback of `at_epoch_end`; else it goes on in the next epoch, and the last is closed when ``fit`` ends, weighted by
    what is in it. Clipping, schedules, moving averages and weight decay of the optimizer inside act once an update.

    Args:
        optimizer: A Keras optimizer, or its name.
        accum_steps: Micro-batches in a window.
        steps_per_epoch: Micro-batches in an epoch, after which a window ends even if it is not full.
        name: Of the optimizer around.

    Raises:
        OptimizerError: `accum_steps` is no positive number, or the optimizer accumulates or scales losses itself.

    Example:
        >>> import keras, numpy as np
        >>> from wholebatch.integrations.keras import GradientAccumulateOptimizer
        >>> optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), accum_steps=4)
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(optimizer, "mse")
        >>> history = model.fit(np.ones((64, 4)), np.ones((64, 1)), batch_size=8, verbose=0)
        >>> int(optimizer.iterations)
        2
    """

    def __init__(
        self, optimizer: Any, accum_steps: int = 4, *, steps_per_epoch: int | None = None, name: str | None = None
    ) -> None:
        for option, value in (("accum_steps", accum_steps), ("steps_per_epoch", steps_per_epoch)):
            if (value is not None or option == "accum_steps") and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise OptimizerError(f"{option} is {value!r}.", hint="give a whole number, 1 or more.")
        inner = keras.optimizers.get(optimizer)
        if getattr(inner, "gradient_accumulation_steps", None):
            raise OptimizerError(
                f"The optimizer has gradient_accumulation_steps={inner.gradient_accumulation_steps} of its own.",
                hint="leave that out; accum_steps says how many micro-batches make a window.",
            )
        if isinstance(inner, GradientAccumulateOptimizer):
            raise OptimizerError(
                "The optimizer is a GradientAccumulateOptimizer already, and a window of windows would be averaged.",
                hint="give one of them the optimizer inside, and as many accum_steps as both have together.",
            )
        if isinstance(inner, keras.optimizers.LossScaleOptimizer):
            raise OptimizerError(
                "A LossScaleOptimizer skips a micro-batch that overflows, and its window would be without it.",
                hint="train with WholeBatchModel or ExactWindows, which skip the whole update.",
            )
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner
        self.accum_steps, self.steps_per_epoch = accum_steps, steps_per_epoch
        self._reached: set[int] = set()

    def build(self, variables: Any) -> None:
        """Make the running sums, in float32 where weights are narrower."""
        if self.built:
            return
        self.inner_optimizer.build(variables)
        super().build(variables)
        self.sums = [
            self.add_variable(
                shape=variable.shape,
                dtype="float32" if variable.dtype in ("float16", "bfloat16") else variable.dtype,
                name=f"sum_{place}",
            )
            for place, variable in enumerate(variables)
        ]
        self.targets = self.add_variable(shape=(), dtype=keras.config.floatx(), name="targets")
        self.micro_batches = self.add_variable(shape=(), dtype="int32", name="micro_batches")
        self.place_in_epoch = self.add_variable(shape=(), dtype="int32", name="place_in_epoch")

    @property
    def variables(self) -> list[Any]:
        """The state of both."""
        own: list[Any] = self._variables + self.inner_optimizer.variables
        return own

    @property
    def learning_rate(self) -> Any:
        """That of the optimizer inside."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> Any:
        """The updates, not the micro-batches."""
        return self.inner_optimizer.iterations

    def apply(self, grads: Any, trainable_variables: Any = None, targets: Any = None) -> None:
        """Take the gradient of a micro-batch, and make the update if it ends the window.

        Args:
            grads: Of a mean over the targets of the micro-batch.
            trainable_variables: The weights, in the order of the gradients.
            targets: How many targets it has. None: as many as any other.
        """
        if not self.built:
            self.build(list(trainable_variables))
        weights = self._trainable_variables
        if trainable_variables is not None and list(map(id, trainable_variables)) != list(map(id, weights)):
            raise OptimizerError(
                "Gradients came for other weights than those with which the optimizer was built.",
                hint="give all of them each time, in the same order, or make a new optimizer.",
            )
        self._reached |= {place for place, grad in enumerate(grads) if grad is not None}
        own, ends = self._taken([variable.value for variable in self._own], grads, targets)
        for variable, value in zip(self._own, own, strict=True):
            variable.assign(value)
        if bool(ends):
            self.close()

    def close(self) -> None:
        """Make the update of the window that is open, of the targets that are in it; of an empty one, none."""
        if not self.built:
            return
        if float(self.targets) != 0:
            mean = self._mean([variable.value for variable in self._own])
            # What no micro-batch reached has no gradient either: a decay of weights would move it at a zero.
            mean = [grad if self._reaches(place) else None for place, grad in enumerate(mean)]
            self.inner_optimizer.apply(mean, self._trainable_variables)
        self._reached = set()
        for variable in self._own[:-1]:
            variable.assign(ops.zeros_like(variable.value))
        if self.steps_per_epoch is not None and int(self.place_in_epoch) >= self.steps_per_epoch:
            self.place_in_epoch.assign(0)

    def stateless_apply(
        self, optimizer_variables: Any, grads: Any, trainable_variables: Any, targets: Any = None
    ) -> tuple[list[Any], list[Any]]:
        """As `apply`, from values to values: ``(trainable_variables, optimizer_variables)``."""
        values = [ops.convert_to_tensor(value) for value in optimizer_variables]
        first = len(self._variables) - len(self._own)
        before, state, inner = values[:first], values[first : len(self._variables)], values[len(self._variables) :]
        own, ends = self._taken(state, grads, targets)
        weights, inner = ops.cond(
            ops.logical_and(ends, ops.not_equal(own[-3], 0)),
            lambda: self.inner_optimizer.stateless_apply(inner, self._mean(own), list(trainable_variables)),
            lambda: (list(trainable_variables), inner),
        )
        own[:-1] = [ops.where(ends, ops.zeros_like(value), value) for value in own[:-1]]
        if self.steps_per_epoch is not None:
            own[-1] = own[-1] % self.steps_per_epoch
        return weights, [*before, *own, *inner]

    def _reaches(self, place: int) -> bool:
        """Return whether a weight has a gradient in this window, also one that another process has begun."""
        return place in self._reached or bool(ops.any(ops.not_equal(self.sums[place].value, 0)))

    @property
    def _own(self) -> list[Any]:
        return [*self.sums, self.targets, self.micro_batches, self.place_in_epoch]

    def _taken(self, state: list[Any], grads: Any, targets: Any) -> tuple[list[Any], Any]:
        """Return the window with one gradient more, and whether that ends it."""
        *sums, seen, count, place = state
        number = ops.cast(1 if targets is None else targets, seen.dtype)
        sums = [
            # Not a product with zero: the mean over no target is not a number.
            old
            if grad is None
            else old + ops.where(number == 0, 0, ops.cast(grad, old.dtype) * ops.cast(number, old.dtype))
            for old, grad in zip(sums, grads, strict=True)
        ]
        count, place = count + 1, place + 1
        ends = count >= self.accum_steps
        if self.steps_per_epoch is not None:
            ends = ops.logical_or(ends, place >= self.steps_per_epoch)
        return [*sums, seen + number, count, place], ends

    def _mean(self, own: list[Any]) -> list[Any]:
        *sums, seen, _, _ = own
        return [
            ops.cast(total / ops.cast(seen, total.dtype), weight.dtype)
            for total, weight in zip(sums, self._trainable_variables, strict=True)
        ]

    def scale_loss(self, loss: Any) -> Any:
        """As the optimizer inside, which divides the gradient of the window by the same."""
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list: Any) -> None:
        """Close the last window; called by ``fit`` when it ends."""
        self.close()
        self.inner_optimizer.finalize_variable_values(var_list)

    def at_epoch_end(self) -> Any:
        """Return a callback for ``fit`` that closes the window at the end of each epoch, before its validation."""
        return _Closing(self)

    def get_config(self) -> dict[str, Any]:
        """Return what makes another optimizer like this one."""
        return {
            "optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "accum_steps": self.accum_steps,
            "steps_per_epoch": self.steps_per_epoch,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "GradientAccumulateOptimizer":
        """Return an optimizer that is like the one of which this is the configuration."""
        inner = keras.saving.deserialize_keras_object(config["optimizer"], custom_objects=custom_objects)
        return cls(**{**config, "optimizer": inner})

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]], targets: Any = None) -> Any:
        """As `apply`, of pairs; return the number of updates."""
        grads, variables = zip(*grads_and_vars, strict=True)
        self.apply(grads, variables, targets)
        return self.iterations


class _Closing(keras.callbacks.Callback):
    """Closes the window of an optimizer at the end of each epoch."""

    def __init__(self, optimizer: GradientAccumulateOptimizer) -> None:
        super().__init__()
        self._optimizer = optimizer

    def on_test_begin(self, logs: Any = None) -> None:  # noqa: ARG002 - as Keras calls it
        self._optimizer.close()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        self._optimizer.close()
