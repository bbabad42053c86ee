"""How does ``model.fit`` train on windows of the micro-batches that its data come in?"""

import inspect
from typing import Any, Literal

import keras

from wholebatch.core.errors import ConfigError, WindowError
from wholebatch.integrations.keras.backends import backend
from wholebatch.integrations.keras.holding import Window
from wholebatch.integrations.keras.wrapping import Wrapping


@keras.saving.register_keras_serializable(package="wholebatch")
class ExactWindows(Wrapping):
    """A model around a Keras model that makes one update of each window of batches that ``fit`` gets from its data.

    For data that come in micro-batches, such as a generator or a `torch.utils.data.DataLoader`; where they are arrays,
    `WholeBatchModel` says it more simply. An optimizer with ``gradient_accumulation_steps`` averages gradients, so that
    a target in a short micro-batch counts more, and leaves the end of an epoch to the next. Here the window holds its
    micro-batches, as they come, until it is full or the epoch ends; then they go through the model one by one, and the
    optimizer is called once with the gradient of all their targets.

    Args:
        model: A Keras model. Its weights are trained in place.
        micro_batches: How many make a window. They need not have the same shapes. The last of an epoch, or of what
            ``fit`` is made to stop in, may be shorter.
        inputs: As of `keras.Model`, instead of `model`.
        outputs: As of `keras.Model`, instead of `model`.
        add_loss: What ``add_loss`` is given in a layer: "mean" over the rows that it sees, or "sum".
        batch_norm: Layers whose state each pass moves: "refuse", or "per_micro_batch" to accept it.
        check: "first" compares four rows of the first batch with their halves, and refuses a model or a loss in which
            rows see each other. None: that is not done.
        name: Of the model around.

    Raises:
        WindowError: `micro_batches` is no positive number.
        ConfigError: There is no model, or it has a train step or a loss of its own.
        MeetingError: In ``fit``: rows see each other.

    Example:
        >>> import keras, numpy as np
        >>> from wholebatch.integrations.keras import ExactWindows
        >>> inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model = ExactWindows(inner, micro_batches=4)
        >>> model.compile(keras.optimizers.SGD(0.1), "mse")
        >>> x, y = np.ones((100, 4)), np.ones((100, 1))
        >>> history = model.fit(x, y, batch_size=8, verbose=0)  # 13 micro-batches: windows of 4, 4, 4 and 1
        >>> int(model.optimizer.iterations)
        4
    """

    def __init__(
        self,
        model: Any = None,
        micro_batches: int = 4,
        *,
        inputs: Any = None,
        outputs: Any = None,
        add_loss: Literal["mean", "sum"] = "mean",
        batch_norm: Literal["refuse", "per_micro_batch"] = "refuse",
        check: Literal["first"] | None = "first",
        name: str | None = None,
    ) -> None:
        if type(micro_batches) is not int or micro_batches < 1:
            raise WindowError(
                f"A window of {micro_batches!r} micro-batches was asked for.",
                hint="micro_batches is a whole number, 1 or more.",
            )
        super().__init__(model, inputs, outputs, add_loss, batch_norm, check, name)
        self.micro_batches = micro_batches
        self.window = Window()

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `keras.Model.fit` does; ``batch_size`` is that of a micro-batch."""
        given = inspect.signature(keras.Model.fit).bind(self, *args, **kwargs).arguments
        given.pop("self")
        callbacks = given.pop("callbacks", None)
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks.append(_Ends(self))
        else:
            own = callbacks if isinstance(callbacks, list | tuple) else [] if callbacks is None else [callbacks]
            callbacks = [_Ends(self), *own]
        self.window.begin(None)
        try:
            return super().fit(**given, callbacks=callbacks)
        finally:
            self.window.begin(None)

    def make_train_function(self, force: bool = False) -> None:
        """Make what ``fit`` and ``train_on_batch`` call with each micro-batch."""
        if force or getattr(self, "train_function", None) is None:
            self.check_compiled()
            if self.steps_per_execution != 1:
                raise ConfigError(
                    f"compile was given steps_per_execution={self.steps_per_execution}, so that the windows would not "
                    "see each micro-batch.",
                    hint="leave that out.",
                )
            self.train_function = backend.stepping(self)
            self.train_function = backend.guarded(self)

    def close(self) -> None:
        """Make the update of the window that is open, if there is one: after the last ``train_on_batch``."""
        if self.window.parts:
            backend.close(self)

    def get_config(self) -> dict[str, Any]:
        """Return what makes another model like this one."""
        return {**super().get_config(), "micro_batches": self.micro_batches}


class _Ends(keras.callbacks.Callback):
    """Where an epoch ends that did not say how long it is, or is cut short."""

    def __init__(self, windows: ExactWindows) -> None:
        super().__init__()
        self._windows = windows
        self._after: dict[str, Any] = {}

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002 - as Keras calls it
        self._windows.window.begin(self.params.get("steps"))
        self._after = {}

    def on_test_begin(self, logs: Any = None) -> None:  # noqa: ARG002 - before the validation forgets the metrics
        self._close()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        self._close()
        if logs is not None:
            logs.update(self._after)

    def _close(self) -> None:
        if self._windows.window.parts:
            self._windows.close()
            self._after = {name: float(value) for name, value in self._windows.get_metrics_result().items()}
