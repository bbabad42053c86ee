"""How is a logical batch cut, and how after memory ran out? The rule that the user gave, or a finer one."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from wholebatch.core.batch import LogicalBatch
from wholebatch.core.errors import OutOfMemoryError
from wholebatch.core.split import Indices, Rows, Tokens, padding

Say: TypeAlias = Callable[[str, int], None]
"""Takes the reason of an automatic choice, and its level of logging."""


@dataclass(slots=True)
class Place:
    """Where an attempt is.

    Attributes:
        rows: Rows of the micro-batch under way; None between and after them.
    """

    rows: int | None = None


@dataclass(frozen=True, slots=True)
class Shortage:
    """What is known of memory that ran out.

    Attributes:
        said: What PyTorch said, in a line.
        rows: Rows of the micro-batch in which it happened; None outside of any.
    """

    said: str
    rows: int | None


class Cutting:
    """The rule by which logical batches are cut. It becomes finer when memory runs out, and stays so.

    Args:
        micro_batch: As for `wb.Accumulator`.
        memory: The same.

    Attributes:
        micro_batch: The rule in force.
    """

    def __init__(self, micro_batch: Literal["auto"] | Rows | Tokens, memory: str | int | None) -> None:
        self.micro_batch = micro_batch
        self._memory = memory

    def cut(self, rows: LogicalBatch, say: Say) -> tuple[list[Indices], float | None]:
        """Return the micro-batches of a logical batch, and the share of padding where lengths are known.

        Args:
            rows: The logical batch.
            say: Takes the reason of an automatic choice.
        """
        if isinstance(self.micro_batch, Tokens):
            lengths = rows.lengths(self.micro_batch.length)
            cut = self.micro_batch.cut(lengths)
            return cut, padding(lengths, cut)
        if isinstance(self.micro_batch, Rows):
            return self.micro_batch.cut(rows.rows), None
        budget = "" if self._memory is None else f", and the budget of {self._memory} is not enforced"
        say(
            f'micro_batch="auto" takes the whole batch of {rows.rows} rows at once and cuts it when memory runs out, '
            f"since planning from memory is not there yet{budget}; say wb.Rows(n) or wb.Tokens(n, length=...) to cut "
            "it.",
            logging.WARNING,
        )
        return [range(rows.rows)], None

    def take_finer(self, rows: LogicalBatch, cut: Sequence[Indices], shortage: Shortage, say: Say) -> None:
        """Make the rule finer, for this logical batch and for those that follow.

        Args:
            rows: The logical batch in which memory ran out.
            cut: Its micro-batches then.
            shortage: What is known of it.
            say: Takes the reason of the choice.

        Raises:
            OutOfMemoryError: A single row was too much, or memory ran out beside the rows.
        """
        several = [part for part in cut if len(part) > 1]
        if shortage.rows == 1 or not several:
            where = "in a micro-batch of one row" if shortage.rows == 1 else "outside of any micro-batch"
            raise OutOfMemoryError(
                f"Memory ran out {where}, and no cut is finer: {shortage.said}",
                hint='shorter rows, precision="bf16", activation checkpointing, a smaller model, or an optimizer with '
                "less state; weights are as before.",
            )
        before = self.micro_batch
        if isinstance(before, Tokens):
            lengths = rows.lengths(before.length)
            largest = max(len(part) * max(lengths[row] for row in part) for part in several)
            self.micro_batch = Tokens(max(1, min(before.tokens, largest)), before.length).halved()
        else:
            self.micro_batch = Rows(max(map(len, several))).halved()
        was = "the whole batch" if before == "auto" else str(before)
        say(
            f"Memory ran out with {was} at once ({shortage.said}): this logical batch and those that follow are cut "
            f"into micro-batches of {self.micro_batch}.",
            logging.WARNING,
        )
