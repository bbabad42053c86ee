"""Which sizes of a micro-batch fit, and which of them is the fastest?"""

import math
from collections.abc import Callable, Mapping, Sequence

from wholebatch.core.need import Need

NEARLY = 0.02
"""The smallest micro-batch is taken whose speed is within this share of the best."""

KNOWN, GUESSED = 0.005, 0.04
"""The share of a budget that is left free: where every moment is known by itself, and where peaks are extrapolated."""

PLACES = 32
"""Of rows whose lengths vary, so many lengths are looked at, and one more."""

SLACK = 1 << 14
"""What is left free beside that where kernels take memory for themselves: the least that they take,
but no more than a tenth of the budget. Unit: bytes."""


def usable(need: Need, budget: int) -> int:
    """Return what of a budget may be planned for: the rest is for what cannot be known. Unit: bytes."""
    known = need.passes.exact and (need.measured is None or need.measured.exact)
    scratch = abs(need.scratch(*_top(need)))
    loose = not known or scratch > 0.02 * need.passes.peak(*_top(need))
    return math.floor(budget * (1 - (GUESSED if loose else KNOWN))) - (min(SLACK, budget // 10) if scratch else 0)


def least_budget(need: Need, rows: int) -> int:
    """Return the smallest budget, to three digits, in which so many rows may be planned for. Unit: bytes."""
    peak = budget = need.peak(rows)
    while usable(need, budget) < peak:
        budget += peak - usable(need, budget)
    return math.ceil(budget * 1.005)  # a size is said in three digits


def _top(need: Need) -> tuple[int, int]:
    return need.passes.rows[1], need.passes.lengths[-1]


def largest_rows(need: Need, budget: int, most: int, length: int = 0) -> int:
    """Return how many rows fit at once into what may be used of a budget; 0: not even one.

    Args:
        need: What training takes.
        budget: Unit: bytes.
        most: The most that are asked for.
        length: Of each row, padded.
    """
    room = usable(need, budget)

    def fits(rows: int) -> bool:
        return need.peak(rows, length, alone=rows >= most) <= room

    return most if fits(most) else _last(fits, most)


def largest_tokens(need: Need, budget: int, lengths: Sequence[int]) -> int:
    """Return the largest budget of padded tokens with which every micro-batch fits; 0: a row alone does not.

    Args:
        need: What training takes.
        budget: Unit: bytes.
        lengths: Tokens of each row; one or more.
    """
    room = usable(need, budget)
    many, ordered = len(lengths), sorted({max(1, length) for length in lengths}, reverse=True)
    longest = ordered[0]
    if need.peak(1, longest) > room:
        return 0
    tokens = many * longest
    for length in {ordered[round(share * (len(ordered) - 1) / PLACES)]: None for share in range(PLACES + 1)}:

        def fits(tokens: int, length: int = length) -> bool:
            # Parts of a row as well: a length in between may go into the tokens without a rest.
            return need.peak(min(many, tokens / length), length) <= room

        if not fits(tokens):
            tokens = _last(fits, tokens)
    return max(1, tokens)


def _last(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, where smaller ones do if it does; 0 if 1 does not."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def candidates(most: int) -> list[int]:
    """Return the numbers of rows that are worth a look at the clock: the most, a quarter and a sixteenth of it.

    Example:
        >>> candidates(64), candidates(3), candidates(1)
        ([4, 16, 64], [1, 3], [1])
    """
    return sorted({most, max(1, most // 4), max(1, most // 16)})


def fastest(seconds: Mapping[int, float]) -> int:
    """Return the smallest micro-batch that is within 2 % of the best, by its time for a row.

    Args:
        seconds: Time of a pass by its rows. Unit: seconds.

    Example:
        >>> fastest({4: 0.5, 16: 1.61, 64: 6.4})
        16
    """
    each = {rows: time / rows for rows, time in seconds.items()}
    best = min(each.values())
    return min(rows for rows, time in each.items() if time <= best * (1 + NEARLY))


def evened(rows: int, most: int) -> int:
    """Return the smallest micro-batch that cuts a batch into no more parts than the largest does.

    Example:
        >>> evened(100, 60), evened(512, 64)
        (50, 64)
    """
    return math.ceil(rows / math.ceil(rows / most))


def line(seconds: Mapping[int, float]) -> tuple[float, float]:
    """Return what a pass costs by itself and for each row, as a line through the smallest and the largest.

    Args:
        seconds: Time of a pass by its rows.

    Returns:
        Both at least 0. Unit: seconds.

    Example:
        >>> line({1: 1.5, 3: 2.5})
        (1.0, 0.5)
    """
    low, high = min(seconds), max(seconds)
    if low == high:
        return 0.0, seconds[low] / low
    each = max(0.0, (seconds[high] - seconds[low]) / (high - low))
    return max(0.0, seconds[high] - each * high), each
