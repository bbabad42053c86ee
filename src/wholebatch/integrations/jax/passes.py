"""How does a logical batch go through one micro-batch at a time, inside a compiled function?

In a `lax.scan` that carries sums, so that nothing of a pass outlives it, and in one pass more for the rows that are
left. Rows are sliced where they lie: the batch is not copied.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from wholebatch.core.errors import SplitError


class Passes:
    """The micro-batches of a logical batch, in order.

    Args:
        batch: A pytree of arrays with the same number of rows.
        micro_batch: Rows of each micro-batch but the last.

    Raises:
        SplitError: The arrays do not agree on the number of rows, or there is none.
    """

    def __init__(self, batch: Any, micro_batch: int) -> None:
        self.rows = _rows(batch)
        self._batch = jax.tree.map(jnp.asarray, batch)
        self._size = min(micro_batch, self.rows)

    def first(self) -> Any:
        """Return the first micro-batch, to look at its shapes."""
        return self._part(0, self._size)

    def added(self, zeros: Any, sums_of: Callable[[Any, Any, int], Any]) -> Any:
        """Return ``zeros`` plus ``sums_of(micro_batch, number, rows)`` of each micro-batch, a pytree of sums."""
        full, left = divmod(self.rows, self._size)

        def add(sums: Any, part: Any, number: Any, rows: int) -> Any:
            return jax.tree.map(lambda old, new: old + new.astype(old.dtype), sums, sums_of(part, number, rows))

        def body(sums: Any, number: Any) -> tuple[Any, None]:
            return add(sums, self._part(number * self._size, self._size), number, self._size), None

        sums, _ = lax.scan(body, zeros, jnp.arange(full))
        if left:
            sums = add(sums, self._part(full * self._size, left), jnp.int32(full), left)
        return sums

    def _part(self, start: Any, rows: int) -> Any:
        return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, rows), self._batch)


def _rows(batch: Any) -> int:
    """Return the rows of a batch, on which all of its arrays agree."""
    shapes = {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(batch)}
    rows = {name or "the batch": shape[0] if shape else None for name, shape in shapes.items()}
    counts = set(rows.values())
    count = next(iter(counts), None)
    if len(counts) == 1 and count:
        return int(count)
    if not rows or counts == {0}:
        raise SplitError(
            "The logical batch has no rows.", hint="give a pytree of arrays whose first dimension are the rows."
        )
    said = ", ".join(f"{name} {'no dimension' if count is None else count}" for name, count in rows.items())
    raise SplitError(
        f"The arrays of one logical batch disagree on how many rows there are: {said}.",
        hint="what is the same for all rows goes after the batch, as an argument of its own: f(params, batch, shared).",
    )
