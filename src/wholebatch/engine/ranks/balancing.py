"""Which rows does a rank take over from others, where a loader has given some more to do than others?"""

import logging
import pickle
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch

from wholebatch.core.balance import costs_of
from wholebatch.core.batch import Layout, LogicalBatch
from wholebatch.core.errors import ConfigError
from wholebatch.core.evening import Move, moves_between
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
        device: Where the model is.
        say: Takes the reason.
    """

    def __init__(
        self,
        wire: Wire,
        layout: Layout,
        micro_batch: Literal["auto"] | Rows | Tokens,
        device: torch.device,
        say: Say,
    ) -> None:
        self._wire = wire
        self._device = device
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
        costs: list[float] = []
        try:
            mine = self._layout.logical_or_nothing(batch)
            costs = self._costs(mine)
        except Exception as error:
            failure = error
        moves = moves_between(self._heard(costs, failure))
        assert mine is not None
        if not moves:
            return mine
        given = [] if mine.rows == 0 else list(mine.given)
        arriving = self._exchanged(moves, given)
        self._say(
            'balance="tokens": rows move between ranks, so that all have equally much to do; the update is that of the '
            "same rows.",
            logging.INFO,
        )
        gone = {move.row for move in moves if move.source == self._wire.rank}
        return self._layout.logical([*(row for place, row in enumerate(given) if place not in gone), *arriving])

    def _exchanged(self, moves: Sequence[Move], given: Sequence[Any]) -> list[Any]:
        """Send the rows that leave this rank to whom they go, and return those that arrive, by rank and row."""
        rank = self._wire.rank
        leaving: dict[int, list[Any]] = {}
        for move in moves:
            if move.source == rank:
                leaving.setdefault(move.to, []).append(given[move.row])
        failure: Exception | None = None
        parcels: dict[int, bytes] = {}
        try:
            parcels = {to: pickle.dumps(rows) for to, rows in leaving.items()}
        except Exception as error:
            failure = error
        heard = self._heard({to: len(parcel) for to, parcel in parcels.items()}, failure)
        nbytes = {source: each[rank] for source, each in enumerate(heard) if rank in each}
        parcels_here = self._wire.exchange(parcels, nbytes, self._device)
        return [row for parcel in parcels_here for row in pickle.loads(parcel)]

    def _heard(self, said: Any, failure: Exception | None) -> list[Any]:
        """Tell the others something, or why this rank cannot, and return what all have said.

        Raises:
            RankError: Another rank could not.
            Exception: What kept this one from it.
        """
        heard = self._wire.gather(said if failure is None else words(failure))
        if failure is not None:
            raise failure
        failed = [(rank, each) for rank, each in enumerate(heard) if isinstance(each, str)]
        if failed:
            raise told(failed)
        return heard

    def _costs(self, mine: LogicalBatch) -> list[float]:
        if mine.rows == 0:
            return []
        if self._length is not None:
            return costs_of(mine.lengths(self._length))
        return [float(max(1, row_size(row))) for row in mine.given]
