"""How do windows of micro-batches become updates of an Optax optimizer, when each holds its own number of targets?"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from wholebatch.core.errors import MissingExtraError, OptimizerError, WeightError
from wholebatch.integrations.jax.sums import require_sum_in, sum_in

try:
    import optax
except ModuleNotFoundError as missing:  # pragma: no cover - in a process without it
    raise MissingExtraError(
        f"wholebatch.integrations.jax needs Optax, and {missing.name} is not installed.",
        hint="pip install 'wholebatch[jax]'",
    ) from None


class MultiStepsState(NamedTuple):
    """Where a window stands.

    Attributes:
        micro_batches: How many the open window holds.
        targets: How many it has seen.
        sums: The running sum of their gradients.
        updates: How many windows became an update.
        updated: Whether the last call was an update.
        inner: The state of the optimizer.
    """

    micro_batches: Any
    targets: Any
    sums: Any
    updates: Any
    updated: Any
    inner: Any


class MultiSteps(optax.GradientTransformationExtraArgs):
    """What `multi_steps` returns: an Optax optimizer that can also close a window whose loader has ended."""

    def close(self, state: MultiStepsState, params: Any) -> tuple[Any, MultiStepsState]:
        """Return the updates of the window that is open, and the state after it; of an empty one, none.

        Args:
            state: Where the window stands.
            params: The parameters.
        """
        nothing = jax.tree.map(jnp.zeros_like, params)
        closed: tuple[Any, MultiStepsState] = self.update(nothing, state, params, targets=0, last=True)
        return closed


def multi_steps(
    optimizer: Any,
    micro_batches: int | Callable[[Any], Any] | None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    accumulate_in: Any = None,
) -> MultiSteps:
    """Return an optimizer that makes one update a window, in which every target counts once.

    `optax.MultiSteps` averages the gradients that it is given: with 1, 5, 3 and 2 labels in four micro-batches, the
    label that is alone counts as much as the five. And a window that an epoch leaves open goes on in the next. Here
    each call says how many targets its gradient is of, and the last of an epoch says so, or `close` is called after it.

    Args:
        optimizer: An Optax optimizer. It sees the gradient of the window: clipping, schedules and moving averages act
            once an update.
        micro_batches: How many make a window: a number, or a function of the number of updates before. None: a window
            ends only where a call says ``last=True``.
        reduction: Of what the gradients are: of a mean over the micro-batch's targets, or of a sum.
        accumulate_in: Dtype of the running sum. None: float32 where parameters are narrower, and else theirs.

    Returns:
        An optimizer whose ``update(grads, state, params, targets=n, last=False)`` returns zeros within a window. A
        micro-batch without a target adds nothing, whatever its gradient; a window without any is no update.

    Raises:
        OptimizerError: `optimizer` is none of Optax, `micro_batches` is no whole number or less than 1, or `reduction`
            is neither of the two; in ``update``, a gradient is float0.
        WeightError: `accumulate_in` is no dtype of floating point numbers; in ``update``, `targets` is no scalar.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> optimizer = multi_steps(optax.sgd(1.0), 2)
        >>> weight = jnp.float32(0)
        >>> state = optimizer.init(weight)
        >>> for mean_grad, targets in ((1.0, 1), (5.0, 3)):
        ...     updates, state = optimizer.update(jnp.float32(mean_grad), state, weight, targets=targets)
        >>> float(updates)
        -4.0
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise OptimizerError(
            f"The optimizer is a {type(optimizer).__name__}, not one of Optax.",
            hint="pass it first: multi_steps(optax.adam(1e-3), 4).",
        )
    if (
        micro_batches is not None
        and not callable(micro_batches)
        and (type(micro_batches) is not int or micro_batches < 1)
    ):
        raise OptimizerError(
            f"A window of {micro_batches!r} micro-batches was asked for.",
            hint="give a whole number, 1 or more, or None if last=True ends each window.",
        )
    if reduction not in ("mean", "sum"):
        raise OptimizerError(f"reduction is {reduction!r}.", hint="say 'mean' or 'sum', whichever was differentiated.")
    require_sum_in(accumulate_in)
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> MultiStepsState:
        sums = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), sum_in(leaf, accumulate_in)), params)
        zero = jnp.zeros((), jnp.int32)
        return MultiStepsState(
            zero, jnp.zeros((), jnp.result_type(float)), sums, zero, jnp.bool_(False), inner.init(params)
        )

    def update(
        grads: Any, state: MultiStepsState, params: Any = None, *, targets: Any = None, last: Any = False, **extra: Any
    ) -> tuple[Any, MultiStepsState]:
        if targets is None:
            raise WeightError(
                "An update was asked for without targets, and a gradient alone does not say how many it is of.",
                hint="call update(grads, state, params, targets=n); where all micro-batches are alike, n=1 will do.",
            )
        if jnp.shape(targets) != ():
            raise WeightError(
                f"targets has the shape {jnp.shape(targets)}.", hint="give their number in the micro-batch, one scalar."
            )
        if any(jnp.result_type(leaf) == jax.dtypes.float0 for leaf in jax.tree.leaves(grads)):
            raise OptimizerError(
                "The gradients hold float0, as those of whole numbers do (allow_int=True), which do not add up.",
                hint="keep what is not trained out of the parameters that the optimizer is given.",
            )
        weight = targets if reduction == "mean" else 1
        sums = jax.tree.map(
            # Not a product with zero: the mean over no target is not a number.
            lambda old, new: (
                old + jnp.where(jnp.asarray(targets) == 0, 0, new.astype(old.dtype) * weight).astype(old.dtype)
            ),
            state.sums,
            grads,
        )
        seen = state.targets + targets
        count = state.micro_batches + 1
        length = micro_batches(state.updates) if callable(micro_batches) else micro_batches
        ends = jnp.asarray(last) if length is None else jnp.logical_or(last, count >= length)

        def step() -> tuple[Any, Any]:
            mean = jax.tree.map(
                lambda total, like: (total / jnp.where(seen == 0, 1, seen).astype(total.real.dtype)).astype(like.dtype),
                sums,
                grads,
            )
            updates, after = inner.update(mean, state.inner, params, **extra)
            return updates, after

        def hold() -> tuple[Any, Any]:
            kinds, _ = jax.eval_shape(step)
            return jax.tree.map(lambda kind: jnp.zeros(kind.shape, kind.dtype), kinds), state.inner

        steps = jnp.logical_and(ends, seen != 0)
        if isinstance(steps, jax.core.Tracer):
            updates, after = lax.cond(steps, step, hold)
        else:  # outside of jit a cond would be compiled anew in each call
            updates, after = step() if steps else hold()
        kept = jax.tree.map(lambda leaf: jnp.where(ends, jnp.zeros_like(leaf), leaf), sums)
        return updates, MultiStepsState(
            jnp.where(ends, 0, count).astype(state.micro_batches.dtype),
            jnp.where(ends, 0, seen).astype(state.targets.dtype),
            kept,
            state.updates + steps,
            steps,
            after,
        )

    return MultiSteps(init, update)
