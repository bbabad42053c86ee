"""JAX: the gradient of a logical batch in the memory of a micro-batch, and windows of micro-batches for Optax."""

from wholebatch.core.errors import MissingExtraError

try:
    import jax as _  # noqa: F401
except ModuleNotFoundError as missing:
    raise MissingExtraError(
        f"wholebatch.integrations.jax needs JAX, and {missing.name} is not installed.",
        hint="pip install 'wholebatch[jax]'",
    ) from None

from wholebatch.integrations.jax.gradient import value_and_grad
from wholebatch.integrations.jax.steps import MultiSteps, MultiStepsState, multi_steps

__all__ = ["MultiSteps", "MultiStepsState", "multi_steps", "value_and_grad"]
