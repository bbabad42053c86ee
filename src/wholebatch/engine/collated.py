"""Does collating leave rows out? Then the rows of the list are not what a loss averages over."""

from collections.abc import Callable
from typing import Any

from wholebatch.core.batch import count_rows
from wholebatch.core.errors import WeightError
from wholebatch.core.tree import flatten, is_array


class Collated:
    """Watches how many of the rows of a list come out of `collate`, as it may leave out bad samples.

    A micro-batch may have fewer rows than the list for other reasons, such as documents that are packed into one row,
    or rows that lie on another dimension. So it is an error only where others have one for each.

    Example:
        >>> collated = Collated()
        >>> collated.take(lambda: {"text": ["a", "b"]}, 2), collated.take(lambda: {"text": ["c"]}, 2)
        ({'text': ['a', 'b']}, {'text': ['c']})
        >>> collated.require_all()
        Traceback (most recent call last):
            ...
        wholebatch.core.errors.WeightError: Of 2 rows of a micro-batch, 1 came out of collate...
        <BLANKLINE>
        hint: count what ...
    """

    def __init__(self) -> None:
        self._one_each = False
        self._fewer: tuple[int, int] | None = None

    def begin(self) -> None:
        """Begin with the next window."""
        self._fewer = None

    def take(self, take: Callable[[], Any], rows: int) -> Any:
        """Take a micro-batch and look how many rows it has.

        Args:
            take: Collates it.
            rows: Of the list. Unit: rows.
        """
        micro_batch = take()
        found = count_rows(micro_batch) if micro_batch is not None else None
        if found is not None and found < rows and not _lie_elsewhere(micro_batch, rows):
            self._fewer = (rows, found)
        elif found == rows > 1:
            self._one_each = True
        return micro_batch

    def require_all(self) -> None:
        """Refuse a window some of whose rows were left out.

        Raises:
            WeightError: They were, and its micro-batches would be weighed by the rows of the list.
        """
        if self._one_each and self._fewer is not None:
            rows, found = self._fewer
            raise WeightError(
                f"Of {rows} rows of a micro-batch, {found} came out of collate, so that the loss does not average over "
                "as many as there are in the list.",
                hint="count what is there: targets=lambda micro_batch: len(micro_batch['x']), or let loss_fn return "
                "(loss_sum, targets).",
            )


def _lie_elsewhere(micro_batch: Any, rows: int) -> bool:
    """Whether all tensors have as many entries as rows on one of their other dimensions."""
    shapes = [leaf.shape for _, leaf, _ in flatten(micro_batch)[0] if is_array(leaf) and len(leaf.shape) > 0]
    return any(all(shape[dim] == rows for shape in shapes) for dim in range(1, min(map(len, shapes), default=0)))
