"""Keras 3: ``model.fit`` whose ``batch_size`` is the logical batch, and windows of the micro-batches that it yields."""

from wholebatch.core.errors import ConfigError, MissingExtraError

try:
    import keras as _keras
except ModuleNotFoundError as missing:
    raise MissingExtraError(
        f"wholebatch.integrations.keras needs Keras, and {missing.name} is not installed. (Keras needs a backend as "
        "well: the one that KERAS_BACKEND names, which is tensorflow where it names none.)",
        hint="pip install 'wholebatch[keras]', and KERAS_BACKEND=torch with torch, or KERAS_BACKEND=jax with jax.",
    ) from None

if _keras.backend.backend() not in ("torch", "jax"):
    raise ConfigError(
        f"Keras runs on {_keras.backend.backend()}; wholebatch.integrations.keras runs on PyTorch and on JAX.",
        hint="set KERAS_BACKEND=torch or KERAS_BACKEND=jax before keras is imported for the first time.",
    )

from wholebatch.integrations.keras.model import WholeBatchModel
from wholebatch.integrations.keras.optimizer import GradientAccumulateOptimizer
from wholebatch.integrations.keras.windows import ExactWindows

__all__ = ["ExactWindows", "GradientAccumulateOptimizer", "WholeBatchModel"]
