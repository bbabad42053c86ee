"""Which rows are looked at? Some like those of training, of which any number of copies can be had."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wholebatch.core.batch import LogicalBatch


@dataclass(frozen=True)
class Sample:
    """Rows like those that will be trained on, of which any number of copies can be had.

    Attributes:
        batch: As a logical batch.
        collate, whole, dims: As for `wb.Accumulator`.
        copied: Whether the micro-batches of training are copies, since their rows do not stand side by side.
    """

    batch: Any
    collate: Callable[[list[Any]], Any] | None = None
    whole: Iterable[str] = ()
    dims: int | Mapping[str, int] | None = None
    copied: bool = False

    @property
    def rows(self) -> LogicalBatch:
        """The rows themselves."""
        return LogicalBatch(self.batch, collate=self.collate, whole=self.whole, dims=self.dims)

    def repeat(self, row: int, times: int) -> LogicalBatch:
        """Return a logical batch of one row, so many times: what it takes is a line in their number."""
        if self.collate is not None:
            return LogicalBatch([self.batch[row]] * times, collate=self.collate)
        return LogicalBatch(self.rows.take([row] * times), whole=self.whole, dims=self.dims)
