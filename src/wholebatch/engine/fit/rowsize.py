"""How much does a row hold? Told from the row itself, before anything is made of it."""

from collections.abc import Mapping
from typing import Any

from wholebatch.engine.fit.sample import Sample


def largest_row(sample: Sample) -> int:
    """Return the row of a sample that holds most; in tensors all rows are alike, and it is the first."""
    if sample.collate is None:
        return 0
    return max(range(len(sample.batch)), key=lambda row: row_size(sample.batch[row]))


def row_size(row: Any) -> int:
    """Return how much a row holds: numbers in tensors, and letters or entries of anything that has a length.

    Example:
        >>> row_size({"text": "abc", "label": 1}), row_size((b"ab", [1, 2, 3]))
        (4, 5)
    """
    if hasattr(row, "numel"):
        return int(row.numel())
    if hasattr(row, "shape") and hasattr(row, "size"):
        return int(row.size)
    if isinstance(row, str | bytes):
        return len(row)
    if isinstance(row, Mapping):
        return sum(map(row_size, row.values()))
    if isinstance(row, list | tuple):
        return sum(map(row_size, row))
    return len(row) if hasattr(row, "__len__") else 1
