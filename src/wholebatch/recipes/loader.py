"""Which rows make the next logical batch? Shuffled by epoch, cut by rows or by tokens."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from wholebatch.core.batch import LogicalBatch
from wholebatch.core.schedules import Fixed, Schedule
from wholebatch.recipes.amount import Amount


class LogicalBatches:
    """The logical batches of each epoch, every row once an epoch.

    The order depends on seed and epoch alone, so that it is the same whatever model trains on it. The last logical
    batch of an epoch holds what is left.

    Args:
        rows: What there is to learn from.
        amount: How much makes one logical batch. Rows are taken until one more would pass that many tokens; a longer
            row is a logical batch of its own.
        length: Tokens of a row; needed if `amount` is in tokens.
        seed: Of the order.
        schedule: How much makes each of them, in place of `amount` and in its unit.

    Raises:
        SplitError: A length is negative or not a whole number.

    Example:
        >>> batches = LogicalBatches("abcde", Amount(2, "rows"))
        >>> [len(batch) for batch in batches.epoch(1)], batches.count(1)
        ([2, 2, 1], 3)
    """

    def __init__(
        self,
        rows: Sequence[Any],
        amount: Amount,
        *,
        length: Callable[[Any], int] | None = None,
        seed: int = 0,
        schedule: Schedule | None = None,
    ) -> None:
        self._rows = rows
        self._length = length if amount.unit == "tokens" else None
        self._seed = seed
        self._schedule = schedule if schedule is not None else Fixed(amount.count)
        self._sizes = [1] * len(rows)
        if amount.unit == "tokens":
            assert length is not None  # the configuration was checked against the recipe
            self._sizes = LogicalBatch(rows, collate=list).lengths(length)

    def epoch(self, number: int, done: int = 0) -> Iterator[list[Any]]:
        """Yield the logical batches of an epoch, in order.

        Args:
            number: Which epoch, from 1.
            done: How many logical batches the epochs before had; only a schedule asks.
        """
        for places in self._places(number, done, self._schedule.ask):
            yield [self._rows[place] for place in places]

    def count(self, number: int, done: int = 0) -> int:
        """Return how many logical batches an epoch has, as far as the schedule knows."""
        return sum(1 for _ in self._places(number, done, self._schedule.at))

    @property
    def whole(self) -> int:
        """How much all rows are together, in the unit of the amount that was asked for."""
        return sum(self._sizes)

    def amount(self, batch: Sequence[Any]) -> int:
        """Return how much a logical batch is, in the unit of the amount that was asked for."""
        return len(batch) if self._length is None else sum(map(self._length, batch))

    def _places(self, number: int, done: int, size: Callable[[int, int], int]) -> Iterator[list[int]]:
        order = list(range(len(self._rows)))
        random.Random(f"{self._seed}/{number}").shuffle(order)
        batch: list[int] = []
        held, most = 0, size(done, number - 1)
        for place in order:
            if batch and held + self._sizes[place] > most:
                yield batch
                done += 1
                batch, held, most = [], 0, size(done, number - 1)
            batch.append(place)
            held += self._sizes[place]
        if batch:
            yield batch
