"""Which rows does a rank load for each logical batch? Every row of the data once an epoch, on one rank."""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import index
from typing import Any, Literal, cast

import torch
from torch import distributed
from torch.utils.data import Sampler, default_collate

from wholebatch.core.balance import ATTENTION, balanced, costs_of
from wholebatch.core.errors import ConfigError, SplitError
from wholebatch.core.schedules.schedule import Fixed, Schedule


class LogicalBatches(Sampler[list[int]]):
    """Yields, for each logical batch, the places of the rows that this rank trains on: a `batch_sampler` for ranks.

    The logical batches are drawn from all rows, and are the same whatever the number of ranks; then the rows of each
    are shared out. Every row comes once an epoch, on one rank: none is repeated to make ranks equal, and none is left
    out, so that the last logical batch holds what is left. A rank gets an empty list where there are fewer rows than
    ranks, which only the last logical batch can bring about; `collate` makes None of it, which `wb.Accumulator.step`
    takes.

    Args:
        lengths: The tokens of each row of the data, or, where rows are alike, how many rows there are.
        rows: Rows of a logical batch, over all ranks; or one of `wb.schedules` that says so for each of them. Then it
            counts those of earlier epochs too, each of which is taken to have been gone through.
        balance: ``"tokens"`` shares out by cost, so that ranks finish together, with `costs_of` and `balanced` of
            `wholebatch.core.balance`; ``"rows"`` gives each rank equally many, give or take one. Default: by tokens
            where there are lengths.
        attention: What a token pays for each token of its row, against what it pays alone: 1 / (6 * width) for a
            transformer, 0 for a model without attention.
        shuffle: Draw the rows anew each epoch (see `set_epoch`), or take them as they stand.
        seed: Of the order; the same on all ranks.
        rank: Which process this is. Default: as `torch.distributed` or torchrun says when an epoch begins; one process
            is a group of one. Give it where not every process has rows of its own, as in tensor parallel training.
        ranks: Of how many processes; goes with `rank`.

    Raises:
        SplitError: There are no rows, a length is not a number, or a logical batch holds nothing.
        ConfigError: An option is not one of those above.

    Example:
        >>> for rank in (0, 1):
        ...     print(list(LogicalBatches([9, 2, 3, 4, 8, 1], rows=4, shuffle=False, rank=rank, ranks=2)))
        [[0], [4]]
        [[1, 2, 3], [5]]
    """

    def __init__(
        self,
        lengths: int | Sequence[int],
        rows: int | Schedule,
        *,
        balance: Literal["tokens", "rows"] | None = None,
        attention: float = ATTENTION,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        ranks: int | None = None,
    ) -> None:
        if balance not in (None, "tokens", "rows"):
            raise ConfigError(
                f"balance={balance!r} is no way to share rows out.", hint='pass "tokens", "rows" or None.'
            )
        schedule = rows if isinstance(rows, Schedule) else None
        if schedule is None and not hasattr(rows, "__index__"):
            raise SplitError(
                f"rows={rows!r} is no whole number.",
                hint="pass how many rows make a logical batch, or one of wb.schedules.",
            )
        if not isinstance(rows, Schedule) and rows < 1:
            raise SplitError(f"A logical batch of {rows} rows holds nothing.", hint="pass rows=1 or more.")
        if (rank is None) != (ranks is None) or (rank is not None and ranks is not None and not 0 <= rank < ranks):
            raise ConfigError(
                f"rank={rank} and ranks={ranks} do not say which process this is.",
                hint="pass both, as in rank=0, ranks=2, or neither.",
            )
        self._costs: list[float] | None = None
        if hasattr(lengths, "__index__") and not hasattr(lengths, "__len__"):
            self._num_rows = index(lengths)
        else:
            tokens = _numbers(lengths)
            self._num_rows = len(tokens)
            if balance != "rows":
                self._costs = costs_of(tokens, attention)
        if balance == "tokens" and self._costs is None:
            raise ConfigError(
                'balance="tokens" needs to know how long each row is.',
                hint='pass the lengths instead of their number, as in [len(row) for row in data], or balance="rows".',
            )
        if self._num_rows < 1:
            raise SplitError("The data hold no rows.", hint="pass the length of each row, or how many there are.")
        self.rows = rows
        self._schedule = schedule if schedule is not None else Fixed(cast(int, rows))
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = 0
        self._place = (rank, ranks) if rank is not None and ranks is not None else None

    def __len__(self) -> int:
        return self._count(self._epoch, self._made_before(self._epoch))

    def __iter__(self) -> Iterator[list[int]]:
        rank, ranks = self._place or place_among_ranks()
        order = torch.arange(self._num_rows)
        if self._shuffle:
            # PyTorch's generator looks at 32 bits only: seed and epoch cannot stand side by side in one number.
            seed = random.Random(f"{self._seed} {self._epoch}").getrandbits(32)
            order = torch.randperm(self._num_rows, generator=torch.Generator().manual_seed(seed))
        done = self._made_before(self._epoch)
        start = 0
        while start < self._num_rows:
            # Asked for when its turn comes: a schedule may go by what became of the logical batches before it.
            rows = self._schedule.ask(done, self._epoch)
            places: list[int] = order[start : start + rows].tolist()
            start, done = start + rows, done + 1
            if self._costs is None:
                yield places[rank::ranks]
            else:
                share = balanced([self._costs[place] for place in places], ranks)[rank]
                yield [places[row] for row in share]

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, on all ranks: it draws an order of its own.

        Args:
            epoch: Any number from 0.
        """
        self._epoch = epoch
        self._schedule.set_epoch(epoch)

    def _made_before(self, epoch: int) -> int:
        """How many logical batches all epochs before this one had."""
        done = 0
        for earlier in range(0 if isinstance(self._schedule, Fixed) else epoch):
            done += self._count(earlier, done)
        return done

    def _count(self, epoch: int, done: int) -> int:
        """How many logical batches an epoch has, as far as the schedule knows."""
        if isinstance(self._schedule, Fixed):
            return -(-self._num_rows // self._schedule.size)
        left, count = self._num_rows, 0
        while left > 0:
            left -= self._schedule.at(done + count, epoch)
            count += 1
        return count

    @staticmethod
    def collate(collate_fn: Callable[[list[Any]], Any] = default_collate) -> Callable[[list[Any]], Any]:
        """Return a collate function for a loader that knows what to do where a rank has no rows: it returns None.

        PyTorch's own fails on an empty list, and only on the ranks that get one.

        Args:
            collate_fn: Makes a batch of one row or more.

        Example:
            >>> collate = LogicalBatches.collate(sum)
            >>> collate([1, 2]), collate([])
            (3, None)
        """
        return partial(_collate_or_none, collate_fn)


def _collate_or_none(collate_fn: Callable[[list[Any]], Any], rows: list[Any]) -> Any:
    return collate_fn(rows) if rows else None


def place_among_ranks() -> tuple[int, int]:
    """Return which process this is, and of how many: of `torch.distributed`, or, before that is set up, of torchrun."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    if distributed.is_available() and distributed.is_torchelastic_launched():
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def _numbers(lengths: Any) -> list[int]:
    if hasattr(lengths, "tolist"):
        lengths = lengths.tolist()
    try:
        return [each.item() if hasattr(each, "item") else each for each in lengths]
    except TypeError:
        raise SplitError(
            f"The lengths are a {type(lengths).__name__}.",
            hint="pass how many rows there are, or a list with the length of each: [len(row) for row in data].",
        ) from None
