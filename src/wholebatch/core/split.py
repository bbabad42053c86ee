"""Which rows go together? By rows, or by a token budget over sorted lengths."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from wholebatch.core.errors import SplitError

Indices: TypeAlias = Sequence[int]
"""The rows of one micro-batch, as places in the logical batch; a `range` where they stand side by side."""


Size: TypeAlias = tuple[str, int]
"""How large micro-batches are: a unit, ``"rows"`` or ``"tokens"``, and how many of it."""


_PASS, _PASS_AT_MOST = 75, 200
"""What a micro-batch costs beside its padded tokens, for passing through the model once more: a thirtieth of the
budget, within these bounds. Unit: tokens.

Byte-level transformers on a CPU took 0.8 to 0.9 ms for a pass where a token took 9 to 12 us, 1.3 ms where it took 17,
and 6.4 ms where it took 290: 22 to 92 tokens. With larger micro-batches fewer passes were faster, as they are on a
device that holds many tokens.
"""

_FILLINGS = 16
"""How many numbers of rows are tried for a micro-batch."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Micro-batches of equally many rows; the last one holds what is left.

    Args:
        rows: Rows in a micro-batch. Unit: rows.

    Raises:
        SplitError: Fewer than one row, or no whole number.

    Example:
        >>> Rows(4).cut(10)
        [range(0, 4), range(4, 8), range(8, 10)]
    """

    rows: int

    def __post_init__(self) -> None:
        _require_whole("wb.Rows", self.rows, "wb.Rows(8)")
        if self.rows < 1:
            raise SplitError(f"A micro-batch of {self.rows} rows holds nothing.", hint="pass wb.Rows(1) or more.")

    def __str__(self) -> str:
        return f"{self.rows} rows"

    def halved(self) -> "Rows":
        """Return the next finer way to cut, or the same where none is finer.

        Example:
            >>> Rows(5).halved(), Rows(1).halved()
            (Rows(rows=3), Rows(rows=1))
        """
        return Rows(-(-self.rows // 2))

    def cut(self, num_rows: int) -> list[Indices]:
        """Return the micro-batches of a logical batch of `num_rows` rows, in order."""
        return [range(start, min(start + self.rows, num_rows)) for start in range(0, num_rows, self.rows)]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Micro-batches of rows of like length, as many as a budget of padded tokens holds.

    The rows of a logical batch may be reordered without changing its gradient, so they are sorted by length, and cut
    where that costs least: a micro-batch costs its padded tokens, plus some for passing through the model once more, a
    thirtieth of the budget within 75 to 200. So it may close before it is full, where the next rows are much shorter.
    The longest rows come first, so that a lack of memory shows at once.

    Args:
        tokens: The budget: rows times the longest row of a micro-batch. Unit: tokens. A row that is longer than the
            budget gets a micro-batch of its own.
        length: Says how long a row is. Unit: tokens. Given a row as it stands in the list, or, where the logical
            batch is made of tensors, the same structure without the row dimension.

    Raises:
        SplitError: The budget is less than one token, or no whole number; or `length` cannot be called.

    Example:
        >>> Tokens(12, length=len).cut([3, 6, 2, 5])
        [[1, 3], [0, 2]]
    """

    tokens: int
    length: Callable[[Any], int]

    def __post_init__(self) -> None:
        _require_whole("wb.Tokens", self.tokens, "wb.Tokens(4096, length=len)")
        if not callable(self.length):
            raise SplitError(
                f"length is a {type(self.length).__name__}, which cannot be called.",
                hint="pass a function that says how long a row is, such as length=len.",
            )
        if self.tokens < 1:
            raise SplitError(
                f"A micro-batch of {self.tokens} tokens holds nothing.",
                hint="pass wb.Tokens(4096, length=...) or whatever the memory holds.",
            )

    def __str__(self) -> str:
        return f"{self.tokens} tokens"

    def halved(self) -> "Tokens":
        """Return the next finer way to cut, or the same where none is finer."""
        return Tokens(-(-self.tokens // 2), self.length)

    def cut(self, lengths: Sequence[int]) -> list[Indices]:
        """Return the micro-batches of rows of these lengths, the longest first; see `cut_by_length`."""
        return cut_by_length(lengths, lambda length: self.tokens // max(1, length), self.tokens)


def cut_by_length(lengths: Sequence[int], most: Callable[[int], int], tokens: int) -> list[Indices]:
    """Return micro-batches of rows of like length, the longest first, that cost least; see `Tokens`.

    The least cost of the first n rows follows from that of fewer rows and one micro-batch more. That micro-batch may
    hold as many rows as its first, which is its longest, allows, or one of some `_FILLINGS` smaller numbers; trying
    them all would save 0.2 % of the padded tokens of documents at the most.

    Args:
        lengths: Of each row. Unit: tokens.
        most: How many rows of a length fit at once; less than one counts as one.
        tokens: The budget, or about what fits at once. Unit: tokens.

    Example:
        >>> cut_by_length([3, 6, 2, 5], lambda length: 12 // length, 12)
        [[1, 3], [0, 2]]
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    a_pass = min(_PASS_AT_MOST, max(_PASS, tokens / 30))
    costs = [0.0] + [math.inf] * len(order)
    starts = [0] * len(costs)
    for start, row in enumerate(order):
        rows = min(max(1, most(lengths[row])), len(order) - start)
        for count in range(rows, 0, -math.ceil(rows / _FILLINGS)):
            cost = costs[start] + a_pass + count * lengths[row]
            if cost < costs[start + count]:
                costs[start + count], starts[start + count] = cost, start
    cut: list[Indices] = []
    end = len(order)
    while end:
        cut.append(order[starts[end] : end])
        end = starts[end]
    return cut[::-1]


def _require_whole(what: str, number: object, example: str) -> None:
    if isinstance(number, bool) or not hasattr(number, "__index__"):
        raise SplitError(f"{what}({number!r}) is no whole number.", hint=f"pass one, as in {example}.")


def side_by_side(rows: Sequence[int | None]) -> list[Indices] | None:
    """Return where the rows of micro-batches stand that follow one another, or None where one does not say how many.

    Args:
        rows: Rows of each micro-batch, or None. Unit: rows.

    Example:
        >>> side_by_side([2, 3])
        [range(0, 2), range(2, 5)]
    """
    cut: list[Indices] = []
    start = 0
    for count in rows:
        if count is None:
            return None
        cut.append(range(start, start + count))
        start += count
    return cut


def padding(lengths: Sequence[int], cut: Iterable[Indices]) -> float:
    """Return which share of the padded positions holds no token.

    Args:
        lengths: Tokens in each row of the logical batch; shape ``[rows]``.
        cut: The micro-batches.

    Returns:
        A share in 0 to 1; 0 for a batch without any position.

    Example:
        >>> round(padding([3, 6, 2, 5], [[1, 3], [0, 2]]), 3)
        0.111
    """
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in cut)
    return 1 - sum(lengths) / padded if padded else 0.0
