"""In which ways is a batch cut, to see whether the cut shows? By rows, permuted, and ragged."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from wholebatch.core.batch import LogicalBatch
from wholebatch.core.split import Indices, Rows, Tokens


@dataclass(frozen=True, slots=True)
class Cut:
    """One way to cut a batch.

    Attributes:
        name: ``"by rows"``, ``"permuted"`` or ``"ragged"``.
        parts: The rows of each micro-batch. They hold every row once.
    """

    name: str
    parts: tuple[Indices, ...]


def three_cuts(rows: LogicalBatch, micro_batch: Rows | Tokens) -> tuple[Cut, Cut, Cut]:
    """Return three cuts of a batch that show different mistakes.

    By rows shows what is wrong with every window. Permuted puts other rows together, which no sum over rows can see.
    Ragged has micro-batches of very different rows, the smallest last, and their number is another: a divisor that
    fits the full window by accident does not fit here. It is permuted as well, so that where it is right there is
    nothing left that the permuted one could show.

    Args:
        rows: The batch.
        micro_batch: How it is cut by rows.

    Example:
        >>> batch = LogicalBatch(list(range(9)), collate=list)
        >>> for cut in three_cuts(batch, Rows(3)):
        ...     print(cut.name, [len(part) for part in cut.parts])
        by rows [3, 3, 3]
        permuted [3, 3, 3]
        ragged [6, 3]
    """
    if isinstance(micro_batch, Tokens):
        parts = micro_batch.cut(rows.lengths(micro_batch.length))
    else:
        parts = micro_batch.cut(rows.rows)
    order = list(range(rows.rows))
    random.Random(0).shuffle(order)
    ragged = _ragged(rows.rows, len(parts))
    return (
        Cut("by rows", tuple(parts)),
        Cut("permuted", reordered(parts, order)),
        Cut("ragged", reordered(ragged, order)),
    )


def reordered(parts: Sequence[Indices], order: Sequence[int]) -> tuple[Indices, ...]:
    """Return parts as large as these, of rows in another order.

    Example:
        >>> reordered([range(0, 2), range(2, 3)], [2, 0, 1])
        ([2, 0], [1])
    """
    ends = list(accumulate(map(len, parts)))
    return tuple(list(order[end - len(part) : end]) for part, end in zip(parts, ends, strict=True))


def equal_parts(num_rows: int, micro_batches: int) -> tuple[Indices, ...]:
    """Return so many micro-batches of as equal rows as can be, the larger ones first.

    Example:
        >>> equal_parts(7, 3)
        (range(0, 3), range(3, 5), range(5, 7))
    """
    small, larger = divmod(num_rows, micro_batches)
    ends = [(place + 1) * small + min(place + 1, larger) for place in range(micro_batches)]
    return tuple(range(start, end) for start, end in zip([0, *ends], ends, strict=False))


def ragged_parts(num_rows: int, micro_batches: int) -> tuple[Indices, ...]:
    """Return so many micro-batches, each with fewer rows than the one before, where the rows allow.

    None has a single row if there are enough for two each: some layers refuse one.

    Example:
        >>> ragged_parts(12, 3)
        (range(0, 6), range(6, 10), range(10, 12))
    """
    shares = list(range(micro_batches, 0, -1))
    least = 2 if num_rows >= 2 * micro_batches else 1
    sizes = [max(least, num_rows * share // sum(shares)) for share in shares]
    sizes[0] += num_rows - sum(sizes)
    if sizes[0] < least:
        return equal_parts(num_rows, micro_batches)
    ends = [sum(sizes[: place + 1]) for place in range(micro_batches)]
    return tuple(range(start, end) for start, end in zip([0, *ends], ends, strict=False))


def _ragged(num_rows: int, micro_batches: int) -> tuple[Indices, ...]:
    """Cut into two micro-batches, or, where by rows there are no more than that, into three."""
    return ragged_parts(num_rows, min(2 if micro_batches > 2 else 3, num_rows))
