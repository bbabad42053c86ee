"""How many rows are taken at once now? As many as were planned, fewer after a shortage, and more again later."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from wholebatch.core.errors import OutOfMemoryError
from wholebatch.core.need import Need

CLEAN = 8
"""After so many logical batches without a shortage, twice the rows are tried again."""


@dataclass(slots=True)
class Share:
    """How many rows of one kind of batch are taken at once.

    Attributes:
        asked: Rows of the batch for which it was planned.
        planned: As planned; None: nobody could, so all of them.
        holds: How much the largest row held then.
        rows: Now: as planned, or fewer after a shortage.
        clean: Logical batches since the last shortage or growth.
        shortages: How often memory ran out, by rows at once.
        unit: What is counted: rows, or padded tokens where rows are sorted by length.
        need: What training takes, by rows, where it is known.
    """

    asked: int
    planned: int | None
    holds: int
    rows: int
    clean: int = 0
    shortages: Counter[int] = field(default_factory=Counter)
    unit: Literal["rows", "tokens"] = "rows"
    need: Need | None = None

    def speaks_for(self, rows: int, holds: int) -> bool:
        """Whether what is known holds for a batch of so many rows, the largest of which holds so much."""
        return self.planned is None or (holds <= self.holds and (self.planned < self.asked or rows <= self.asked))

    def takes(self, at_once: int, rows: int) -> int | None:
        """Return what a window takes above what is there between two, or None where nobody knows. Unit: bytes."""
        if self.need is None:
            return None
        return self.need.peak(at_once, alone=at_once >= rows) - self.need.resident_bytes

    def grow(self) -> bool:
        """Take twice the rows again when a shortage seems to have passed; return whether that was so.

        A number of rows that ran out twice is not tried again, nor are more.
        """
        goal = self.asked if self.planned is None else self.planned
        if self.rows >= goal:
            return False
        self.clean += 1
        more = min(2 * self.rows, goal)
        barred = any(times > 1 and rows <= more for rows, times in self.shortages.items())
        if self.clean <= CLEAN or barred:
            return False
        self.clean, self.rows = 0, more
        return True

    def shrink(self, at_once: int, finer: int) -> None:
        """Take fewer rows: memory ran out with so many at once."""
        self.shortages[at_once] += 1
        self.clean, self.rows = 0, finer

    @property
    def tried_again(self) -> str:
        """Why more rows are taken again, in a sentence."""
        return (
            f"{CLEAN} logical batches went by without a shortage: micro-batches of {self.rows} {self.unit} are "
            "tried again."
        )


def no_finer(where: str, said: str) -> OutOfMemoryError:
    """Return the error that says that memory ran out where no cut can help.

    Args:
        where: Such as ``"in a micro-batch of one row"``.
        said: What PyTorch said.
    """
    return OutOfMemoryError(
        f"Memory ran out {where}, and no cut is finer: {said}",
        hint='shorter rows, precision="bf16", activation checkpointing, a smaller model, or an optimizer with less '
        "state; weights are as before.",
    )
