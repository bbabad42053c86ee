"""Which rows of x, y and sample_weight make a micro-batch?"""

from collections.abc import Iterator, Sequence
from typing import Any

import keras

from wholebatch.core.errors import SplitError


class Sliced:
    """A logical batch in hand, cut by rows.

    Args:
        data: ``(x, y, sample_weight)``.
        micro_batch: Rows of each part but the last.

    Attributes:
        rows: Of the logical batch.
        alike: Whether all parts have the same shapes beside their rows.
    """

    alike = True

    def __init__(self, data: Any, micro_batch: int) -> None:
        self.data, self.rows = data, num_rows(data)
        self.micro_batch = min(micro_batch, self.rows)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, self.rows, self.micro_batch):
            yield rows_of(self.data, start, start + self.micro_batch)


class Held:
    """A logical batch that came in parts.

    Args:
        parts: Each ``(x, y, sample_weight)``.

    Attributes:
        parts: As given.
        rows: Of the logical batch.
        alike: Whether all parts have the same shapes beside their rows.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts
        self.rows = sum(num_rows(part) for part in parts)
        self.alike = len({str(shapes(part, beside_rows=True)) for part in parts}) == 1

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts)


def num_rows(data: Any) -> int:
    """Return the rows of what ``fit`` hands to a train step, on which all arrays agree."""
    counts = [int(leaf.shape[0]) if len(leaf.shape) else None for leaf in keras.tree.flatten(data) if leaf is not None]
    if len(set(counts)) == 1 and counts[0]:
        return counts[0]
    if set(counts) == {0}:
        raise SplitError("The logical batch has no rows.", hint="leave empty batches out of the data.")
    raise SplitError(
        "The arrays of one logical batch disagree on how many rows there are: "
        f"{', '.join('no dimension' if count is None else str(count) for count in counts) or 'there is no array'}.",
        hint="give x, y and sample_weight the same first dimension, of at least one row.",
    )


def rows_of(data: Any, start: Any, stop: Any) -> Any:
    """Return the rows from `start` to before `stop`."""
    return keras.tree.map_structure(lambda leaf: None if leaf is None else leaf[start:stop], data)


def shapes(data: Any, *, beside_rows: bool = False) -> list[Any]:
    """Return the shape of each array."""
    return [None if leaf is None else tuple(leaf.shape[beside_rows:]) for leaf in keras.tree.flatten(data)]
