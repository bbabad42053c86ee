"""How does ``model.fit`` train on logical batches with the memory of micro-batches?"""

from typing import Any, Literal

import keras

from wholebatch.core.errors import SplitError
from wholebatch.integrations.keras.backends import backend
from wholebatch.integrations.keras.cutting import Sliced
from wholebatch.integrations.keras.wrapping import Wrapping


@keras.saving.register_keras_serializable(package="wholebatch")
class WholeBatchModel(Wrapping):
    """A model around a Keras model, of which ``fit(batch_size=512)`` is exact and needs the memory of 8 rows.

    The batch that ``fit`` hands to a train step is the logical batch. It goes through the model in micro-batches, and
    the optimizer is called once, with the gradient of the undivided batch: masks, sample weights and class weights
    divide as they do there, a short last batch is divided by what is in it, regularizers and clipping act once, and
    metrics see all rows.

    Args:
        model: A Keras model. Its weights are trained in place.
        micro_batch: Rows that one pass sees.
        inputs: As of `keras.Model`, instead of `model`.
        outputs: As of `keras.Model`, instead of `model`.
        add_loss: What ``add_loss`` is given in a layer: "mean" over the rows that it sees, or "sum". The first is
            shared by rows, the second added up. (Keras itself makes means of activity regularizers.)
        batch_norm: Layers whose state each pass moves, such as batch normalization that is trained: "refuse", or
            "per_micro_batch" to accept it.
        check: "first" compares four rows of the first batch with their halves, and refuses a model or a loss in which
            rows see each other. None: that is not done.
        name: Of the model around.

    Raises:
        ConfigError: There is no model, or it has a train step or a loss of its own.
        MeetingError: In ``fit``: rows see each other.
        BatchNormError: In ``fit``: a pass moves more than random seeds.
        LossError: In ``fit``: a loss returns one number for all rows, or its parts cannot be told.

    Example:
        >>> import keras, numpy as np
        >>> from wholebatch.integrations.keras import WholeBatchModel
        >>> inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model = WholeBatchModel(inner, micro_batch=8)
        >>> model.compile(keras.optimizers.SGD(0.1), "mse")
        >>> x, y = np.ones((100, 4)), np.ones((100, 1))
        >>> history = model.fit(x, y, batch_size=64, verbose=0)  # two updates: of 64 rows and of 36
        >>> int(model.optimizer.iterations)
        2
    """

    def __init__(
        self,
        model: Any = None,
        micro_batch: int = 8,
        *,
        inputs: Any = None,
        outputs: Any = None,
        add_loss: Literal["mean", "sum"] = "mean",
        batch_norm: Literal["refuse", "per_micro_batch"] = "refuse",
        check: Literal["first"] | None = "first",
        name: str | None = None,
    ) -> None:
        if type(micro_batch) is not int or micro_batch < 1:
            raise SplitError(
                f"A micro-batch of {micro_batch!r} rows was asked for.",
                hint="micro_batch is a whole number, 1 or more.",
            )
        super().__init__(model, inputs, outputs, add_loss, batch_norm, check, name)
        self.micro_batch = micro_batch

    def make_train_function(self, force: bool = False) -> None:
        """Make what ``fit`` and ``train_on_batch`` call with each logical batch."""
        if force or getattr(self, "train_function", None) is None:
            self.check_compiled()
            super().make_train_function(force)
            self.train_function = backend.guarded(self)

    def train_step(self, *given: Any) -> Any:
        """Make the update of a logical batch; called by ``fit`` and ``train_on_batch``."""
        *state, data = given
        return backend.step(self, *state, Sliced(keras.utils.unpack_x_y_sample_weight(data), self.micro_batch))

    def test_step(self, *given: Any) -> Any:
        """Measure a batch, in micro-batches as well; called by ``evaluate`` and for validation."""
        *state, data = given
        return backend.test_step(self, *state, Sliced(keras.utils.unpack_x_y_sample_weight(data), self.micro_batch))

    def get_config(self) -> dict[str, Any]:
        """Return what makes another model like this one."""
        return {**super().get_config(), "micro_batch": self.micro_batch}
