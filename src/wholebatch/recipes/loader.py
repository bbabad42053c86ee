"""Which rows make the next logical batch? Shuffled by epoch, cut by rows or by tokens."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from wholebatch.core.batch import LogicalBatch
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
    ) -> None:
        self._rows = rows
        self._amount = amount
        self._seed = seed
        self._sizes = [1] * len(rows)
        if amount.unit == "tokens":
            assert length is not None  # the configuration was checked against the recipe
            self._sizes = LogicalBatch(rows, collate=list).lengths(length)

    def epoch(self, number: int) -> Iterator[list[Any]]:
        """Yield the logical batches of an epoch, in order.

        Args:
            number: Which epoch, from 1.
        """
        for places in self._places(number):
            yield [self._rows[place] for place in places]

    def count(self, number: int) -> int:
        """Return how many logical batches an epoch has."""
        return sum(1 for _ in self._places(number))

    def _places(self, number: int) -> Iterator[list[int]]:
        order = list(range(len(self._rows)))
        random.Random(f"{self._seed}/{number}").shuffle(order)
        batch: list[int] = []
        held = 0
        for place in order:
            if batch and held + self._sizes[place] > self._amount.count:
                yield batch
                batch, held = [], 0
            batch.append(place)
            held += self._sizes[place]
        if batch:
            yield batch
