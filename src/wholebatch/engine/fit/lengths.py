"""How long is each row? Told from the rows themselves, where one number tells to what a micro-batch is padded."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

_PLAIN = (int, float, complex, bool, type(None))


def lengths_of(rows: Sequence[Any]) -> list[int] | None:
    """Return the length of each row of a list, or None where the rows do not tell.

    A row is looked at as it is before it is collated: texts, lists of numbers, and every dimension of a tensor have a
    length. Those that are not the same for all rows must rise together, so that in any group of rows one of them is
    the longest in every respect; then it alone decides what the others are padded to.

    Args:
        rows: As a loader gives them.

    Returns:
        Unit: whatever the longest part counts, such as tokens. None where all rows are alike, where two lengths vary
        apart, as source and target of a translation do, and where rows are built differently.

    Example:
        >>> lengths_of([{"tokens": [1, 2, 3], "label": 1}, {"tokens": [1], "label": 0}])
        [3, 1]
        >>> lengths_of([("ab", "x"), ("a", "xyz")]) is None
        True
    """
    told = [tuple(_lengths_in(row, "")) for row in rows]
    if not told or any([path for path, _ in one] != [path for path, _ in told[0]] for one in told):
        return None
    columns = list(zip(*([length for _, length in one] for one in told), strict=True))
    varying = [column for column in columns if len(set(column)) > 1]
    if not varying:
        return None
    varying.sort(key=sum, reverse=True)
    chain = sorted(zip(*varying, strict=True))
    for shorter, longer in pairwise(chain):
        if any(one > other for one, other in zip(shorter, longer, strict=True)):
            return None
    return list(varying[0])


def _lengths_in(value: Any, path: str) -> Iterator[tuple[str, int]]:
    """Every length in a row, with where it was found."""
    if hasattr(value, "shape"):
        yield from ((f"{path}/{dim}", int(length)) for dim, length in enumerate(value.shape))
    elif isinstance(value, str | bytes):
        yield path, len(value)
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _lengths_in(entry, f"{path}.{name}")
    elif isinstance(value, list | tuple):
        if isinstance(value, list) and (not value or isinstance(value[0], _PLAIN)):
            yield path, len(value)
        else:
            for place, entry in enumerate(value):
                yield from _lengths_in(entry, f"{path}.{place}")
    elif not isinstance(value, _PLAIN) and hasattr(value, "__len__"):
        yield path, len(value)
