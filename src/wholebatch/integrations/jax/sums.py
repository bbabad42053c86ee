"""In which dtype does the gradient of a parameter add up? One that loses nothing of it."""

from typing import Any

import jax
import jax.numpy as jnp

from wholebatch.core.errors import WeightError


def require_sum_in(accumulate_in: Any) -> None:
    """Refuse a dtype in which gradients cannot be added up.

    Raises:
        WeightError: It is no dtype of floating point numbers.
    """
    if accumulate_in is None:
        return
    try:
        inexact = jnp.issubdtype(jnp.dtype(accumulate_in), jnp.inexact)
    except TypeError:
        inexact = False
    if not inexact:
        raise WeightError(
            f"accumulate_in={accumulate_in!r} is no dtype in which gradients add up.",
            hint="pass one of floating point numbers, such as jnp.float32; None takes float32 where parameters are "
            "narrower, and else theirs.",
        )


def sum_in(leaf: Any, accumulate_in: Any) -> Any:
    """Return the dtype of the running sum for a parameter; complex where that is."""
    dtype = jnp.result_type(leaf)
    wide = jnp.promote_types(dtype, jnp.float32) if accumulate_in is None else jnp.dtype(accumulate_in)
    return jnp.promote_types(wide, jnp.complex64) if jnp.issubdtype(dtype, jnp.complexfloating) else wide


def untrainable(tree: Any) -> list[str]:
    """Return what of a pytree has no gradient, each with its place and dtype."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    kinds = [(jax.tree_util.keystr(path), jnp.result_type(leaf)) for path, leaf in found]
    return [f"{place} {kind}".strip() for place, kind in kinds if not jnp.issubdtype(kind, jnp.inexact)]
