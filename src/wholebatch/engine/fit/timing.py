"""Which of the sizes that fit is the fastest? A few passes tell, where a window is long enough to be worth them."""

import math
from collections.abc import Sequence

from wholebatch.core.budget import say_rate
from wholebatch.engine import memory
from wholebatch.engine.fit.probe import Probe

BRIEF = 0.03
"""A window that takes less is not worth a second look at the clock. Unit: seconds."""

SHORT = 0.02
"""The largest size, where a pass of it takes less, is run again before a smaller one is preferred. Unit: seconds."""

NEARLY = 0.03
"""The largest size is taken whose speed is within this share of the best: the clock is not finer, and each micro-batch
costs something beside its pass."""

WORSE = 0.5
"""Where a size is slower than the best by more than this share, smaller ones are not looked at. Less may be another
process, which makes a pass slower, and never faster."""


def fastest_of(probe: Probe, most: int, rows: int, row: int) -> tuple[int, str]:
    """Return how many rows to take at once, and what the clock said.

    The largest that fits is looked at first, then smaller ones as long as that does not look worse; and again, all but
    the largest where it takes long, before a smaller one is taken.

    Args:
        probe: Runs passes.
        most: The most that fit. Unit: rows.
        rows: Of the logical batch.
        row: Which row of the sample is run.
    """
    sizes = sorted({max(1, most // part) for part in (16, 4, 2, 1)}, reverse=True)
    if len(sizes) == 1 or probe.row_seconds * rows < BRIEF:
        return most, ""
    each: dict[int, float] = {}

    def look(size: int) -> None:
        seconds = _seconds(probe, size, row)
        if seconds is not None:
            each[size] = min(each.get(size, math.inf), seconds / size)

    for size in sizes:
        look(size)
        if size not in each:
            continue
        if len(each) == 1 and each[size] * rows < BRIEF:
            return most, ""
        if each[size] > min(each.values()) * (1 + WORSE):
            break
    if not each:
        return most, ""
    chosen = _best(each)
    if chosen != most:  # another may have been disturbed
        for size in sorted(each):
            if size < max(each) or each[size] * size < SHORT:
                look(size)
        chosen = _best(each)
    said = ", ".join(f"{say_rate(1 / one)} with {size}" for size, one in sorted(each.items()) if one > 0)
    return chosen, f" (rows a second: {said})"


def clock(probe: Probe, sizes: Sequence[int], row: int, *, patience: float = float("inf")) -> dict[int, float]:
    """Time passes of some sizes, from small to large, as long as memory holds and the next is not too long.

    A size that the model refuses, as batch norm does a single row, is left out.

    Args:
        probe: Runs passes.
        sizes: Rows of each pass.
        row: Which row of the sample.
        patience: The longest that a pass may be expected to take. Unit: seconds.

    Returns:
        Time of a pass by its rows. Unit: seconds.

    Raises:
        Exception: What the model said, if it refuses them all.
    """
    seconds: dict[int, float] = {}
    refused: Exception | None = None
    for place, rows in enumerate(sorted(sizes)):
        if seconds and max(seconds.values()) * rows / max(seconds) > patience:
            break
        try:
            if place == 0:  # the first pass of all compiles and allocates
                probe.seconds(rows, row)
            taken = probe.seconds(rows, row)
            seconds[rows] = min(taken, probe.seconds(rows, row)) if taken < SHORT else taken
        except Exception as error:
            if memory.is_out_of_memory(error):
                return seconds
            refused = error
    if refused is not None and not seconds:
        raise refused
    return seconds


def _best(each: dict[int, float]) -> int:
    """The largest size that is about as fast as any."""
    best = min(each.values())
    return max(size for size, one in each.items() if one <= best * (1 + NEARLY))


def _seconds(probe: Probe, size: int, row: int) -> float | None:
    """How long a pass takes; None where memory ran out, or the model refuses it, as batch norm does a single row."""
    try:
        if probe.device.type != "cpu":  # it compiles and allocates at the first pass of each size
            probe.seconds(size, row)
        return probe.seconds(size, row)
    except Exception as error:
        if memory.is_out_of_memory(error):
            memory.free_cached(probe.device)
        return None
