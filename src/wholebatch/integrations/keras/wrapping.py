"""What does a model need so that its train step can be another? A model around it, which ``fit`` trains."""

from collections.abc import Sequence
from typing import Any, Literal

import keras

from wholebatch.core.errors import ConfigError, OptimizerError


class Wrapping(keras.Model):
    """Around a model, whose weights it trains in place.

    Args:
        model: The model, or None with `inputs` and `outputs`.
        inputs: As of `keras.Model`.
        outputs: As of `keras.Model`.
        add_loss: What ``add_loss`` in a layer is given: "mean" over the rows that it sees, or "sum".
        batch_norm: What is done about layers whose state each pass moves: "refuse" or "per_micro_batch".
        check: "first" or None: whether a few rows of the first batch are compared with their halves.
        name: Of the model around.
    """

    def __init__(
        self,
        model: Any,
        inputs: Any,
        outputs: Any,
        add_loss: Literal["mean", "sum"],
        batch_norm: Literal["refuse", "per_micro_batch"],
        check: Literal["first"] | None,
        name: str | None,
    ) -> None:
        if model is None and inputs is not None and outputs is not None:
            model = keras.Model(inputs=inputs, outputs=outputs)
        elif not isinstance(model, keras.Model) or inputs is not None or outputs is not None:
            raise ConfigError(
                f"{type(self).__name__} was given a {type(model).__name__} as its model"
                + (", and inputs or outputs." if (inputs, outputs) != (None, None) else "."),
                hint="give it a keras.Model, or inputs=model.input and outputs=model.output.",
            )
        for option, value, known in (
            ("add_loss", add_loss, ("mean", "sum")),
            ("batch_norm", batch_norm, ("refuse", "per_micro_batch")),
            ("check", check, ("first", None)),
        ):
            if value not in known:
                raise ConfigError(f"{option} is {value!r}.", hint=f"say one of {', '.join(map(repr, known))}.")
        _refuse_own_steps(model)
        # Autocast stays with the layers inside: what goes into them is not rounded before.
        super().__init__(name=name, dtype=model.dtype_policy, autocast=False)
        self.model = model
        self.built = model.built  # then weights can be loaded before a batch has come
        self.add_loss_is, self.batch_norm = add_loss, batch_norm
        self.check_first = check is not None
        self.examined = self.checked = False

    @property
    def output_names(self) -> Sequence[str] | None:
        """The names of the outputs, by which ``compile`` takes losses and metrics."""
        return getattr(self.model, "output_names", None)

    def build(self, input_shape: Any = None) -> None:
        """Build the model inside, where that is not done."""
        if not self.model.built:
            self.model.build(input_shape)

    def call(self, inputs: Any, training: Any = None) -> Any:
        """Return what the model returns."""
        return self.model(inputs, training=training)

    def check_compiled(self) -> None:
        """Refuse what a cut batch cannot do; called before the first train step after ``compile``."""
        self.examined = self.checked = False
        _refuse_own_steps(self, besides=("train_step",))
        innermost: Any = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        if getattr(innermost, "gradient_accumulation_steps", None) or hasattr(innermost, "accum_steps"):
            raise OptimizerError(
                f"The optimizer {innermost.name} accumulates gradients itself, so that it would average those of whole "
                "windows.",
                hint=f"give compile one that does not: {type(self).__name__} calls it once an update.",
            )

    def get_config(self) -> dict[str, Any]:
        """Return what makes another model like this one."""
        return {
            "model": keras.saving.serialize_keras_object(self.model),
            "add_loss": self.add_loss_is,
            "batch_norm": self.batch_norm,
            "check": "first" if self.check_first else None,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Return a model that is like the one of which this is the configuration."""
        inner = keras.saving.deserialize_keras_object(config["model"], custom_objects=custom_objects)
        return cls(**{**config, "model": inner})


def _refuse_own_steps(model: Any, besides: tuple[str, ...] = ()) -> None:
    for method in ("train_step", "compute_loss", "_compute_loss"):
        if method not in besides and getattr(type(model), method) is not getattr(keras.Model, method):
            raise ConfigError(
                f"{type(model).__name__} has a {method} of its own, and what that divides by cannot be seen.",
                hint="give the loss to compile, and terms beside it to add_loss; or keep the train step, and use "
                "GradientAccumulateOptimizer with targets.",
            )
