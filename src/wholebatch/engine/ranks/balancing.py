"""Which rows does a rank take over from others, where a loader has given some more to do than others?"""

import logging
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

from wholebatch.core.balance import costs_of
from wholebatch.core.batch import Layout, LogicalBatch
from wholebatch.core.errors import ConfigError
from wholebatch.core.evening import moves_between
from wholebatch.core.split import Rows, Tokens
from wholebatch.engine.fit.rowsize import row_size
from wholebatch.engine.ranks.message import told, words
from wholebatch.engine.ranks.wire import Wire
from wholebatch.engine.reasons import Say

Balance: TypeAlias = Literal["tokens"]
"""By what rows are shared out anew between ranks."""


def check_balance(balance: str | None, collate: Callable[[list[Any]], Any] | None) -> None:
    """Refuse what rows cannot be shared out by.

    Raises:
        ConfigError: There is no such way, or no list of rows.
    """
    if balance is None:
        return
    if balance not in get_args(Balance):
        raise ConfigError(f"balance={balance!r} is no way to share rows out.", hint='pass "tokens", or leave it out.')
    if collate is None:
        raise ConfigError(
            'balance="tokens" moves rows between ranks, and without `collate` a logical batch is tensors, not rows.',
            hint="pass collate=..., and hand accumulator.step a list of rows; or let wb.LogicalBatches share them out.",
        )


class Balancing:
    """Evens out what ranks have to do in one logical batch. The update is that of the same rows.

    Args:
        wire: Speaks to the other ranks.
        layout: How rows lie in a batch: in a list.
        micro_batch: Says how long a row is, if it does; else a row costs what it holds.
        say: Takes the reason.
    """

    def __init__(self, wire: Wire, layout: Layout, micro_batch: Literal["auto"] | Rows | Tokens, say: Say) -> None:
        self._wire = wire
        self._layout = layout
        self._length = micro_batch.length if isinstance(micro_batch, Tokens) else None
        self._say = say

    def shared(self, batch: Any) -> LogicalBatch:
        """Return this rank's part of a logical batch after rows have moved.

        Args:
            batch: The part that it was given, or None.

        Raises:
            RankError: Another rank could not read its part.
            Exception: What reading this one raised.
        """
        mine: LogicalBatch | None = None
        failure: Exception | None = None
        said: list[float] | str
        try:
            mine = self._layout.logical_or_nothing(batch)
            said = self._costs(mine)
        except Exception as error:
            failure, said = error, words(error)
        heard = self._wire.gather(said)
        if failure is not None:
            raise failure
        failed = [(rank, each) for rank, each in enumerate(heard) if isinstance(each, str)]
        if failed:
            raise told(failed)
        assert mine is not None
        moves = moves_between(heard)
        if not moves:
            return mine
        rank = self._wire.rank
        given = [] if mine.rows == 0 else list(mine.given)
        leaving = [move.row for move in moves if move.source == rank]
        arriving: list[Any] = []
        for source, rows in enumerate(self._wire.gather([given[row] for row in leaving])):
            sent = [move for move in moves if move.source == source]
            arriving += [row for move, row in zip(sent, rows, strict=True) if move.to == rank]
        self._say(
            'balance="tokens": rows move between ranks, so that all have equally much to do; the update is that of the '
            "same rows.",
            logging.INFO,
        )
        gone = set(leaving)
        return self._layout.logical([*(row for place, row in enumerate(given) if place not in gone), *arriving])

    def _costs(self, mine: LogicalBatch) -> list[float]:
        if mine.rows == 0:
            return []
        if self._length is not None:
            return costs_of(mine.lengths(self._length))
        return [float(max(1, row_size(row))) for row in mine.given]
