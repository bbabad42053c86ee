"""Which of the sizes that fit is the fastest? A few passes tell, where a window is long enough to be worth them."""

from wholebatch.engine import memory
from wholebatch.engine.fit.probe import Probe

BRIEF = 0.03
"""A window that takes less is not worth a look at the clock. Unit: seconds."""

SHORT = 0.02
"""A pass that takes less is run twice. Unit: seconds."""

NEARLY = 0.03
"""The largest size is taken whose speed is within this share of the best: the clock is not finer, and each micro-batch
costs something beside its pass."""


def fastest_of(probe: Probe, most: int, rows: int, row: int) -> tuple[int, str]:
    """Return how many rows to take at once, and what the clock said.

    Args:
        probe: Runs passes.
        most: The most that fit. Unit: rows.
        rows: Of the logical batch.
        row: Which row of the sample is run.
    """
    sizes = sorted({max(1, most // part) for part in (16, 4, 2, 1)})
    if len(sizes) == 1:
        return most, ""
    each: dict[int, float] = {}
    for place, size in enumerate(sizes):
        try:
            if place == 0:  # the first pass of all compiles and allocates
                probe.seconds(size, row)
            seconds = probe.seconds(size, row)
            if seconds < SHORT:
                seconds = min(seconds, probe.seconds(size, row))
        except Exception as error:
            if memory.is_out_of_memory(error):
                break
            continue  # a size that the model refuses, as batch norm does a single row
        each[size] = seconds / size
        if seconds / size * rows < BRIEF:
            return most, ""
    if not each:
        return most, ""
    best = min(each.values())
    chosen = max(size for size, one in each.items() if one <= best * (1 + NEARLY))
    said = ", ".join(f"{1 / one:,.4g} with {size}" for size, one in each.items() if one > 0)
    return chosen, f" (rows a second: {said})"
