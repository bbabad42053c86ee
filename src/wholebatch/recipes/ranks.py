"""Which of several processes is this, and what does that change for a job?

A job on several ranks is one job: each process makes the same model and the same logical batches and takes its share of
the rows of each. The first rank writes log, files and progress; the others only say what goes wrong on them.
"""

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from wholebatch.core.balance import balanced, costs_of
from wholebatch.core.errors import ConfigError, RankError
from wholebatch.engine.ranks.wire import let_go

PATIENCE = timedelta(seconds=20)
"""How long a rank that failed waits at its end for the first one to write its report: a launcher stops all ranks as
soon as one is gone."""

_WRITTEN = "wholebatch: the first rank has written its report"


class Place:
    """One process among several, or alone.

    Attributes:
        rank: Which it is.
        ranks: How many there are.
        stopped: The signal that told this process to stop, or None.

    Example:
        >>> place = Place(rank=1, ranks=2)
        >>> place.first, place.share("abcde"), place.share(["long row", "a", "b", "c"], length=len)
        (False, ['b', 'd'], ['a', 'b', 'c'])
    """

    def __init__(self, rank: int = 0, ranks: int = 1, store: Any = None) -> None:
        self.rank = rank
        self.ranks = ranks
        self.stopped: signal.Signals | None = None
        self._store = store
        self._working = False

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The context in which a signal to stop breaks off what is done; what is written after it is not broken off."""
        self._working = True
        try:
            yield
        finally:
            self._working = False

    def stop(self, number: int, _frame: FrameType | None) -> None:
        """Hear a signal to stop, the first one: a launcher passes on the Ctrl-C that the terminal has sent as well, and
        sends SIGTERM when another rank is gone.

        Raises:
            KeyboardInterrupt: This rank is at work.
        """
        if self.stopped is None and self._working:
            self.stopped = signal.Signals(number)
            raise KeyboardInterrupt

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def share(self, rows: Sequence[Any], length: Callable[[Any], int] | None = None) -> list[Any]:
        """Return the rows of a logical batch that this rank trains on; every row goes to one rank.

        Args:
            rows: Of the logical batch.
            length: Tokens of a row; then ranks get equally much to do instead of equally many rows.
        """
        if self.ranks == 1:
            return list(rows)
        if length is None:
            return list(rows[self.rank :: self.ranks])
        costs = costs_of([length(row) for row in rows])
        return [rows[place] for place in balanced(costs, self.ranks)[self.rank]]

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """Return the largest of each number over all ranks."""
        if self.ranks == 1:
            return list(numbers)
        found = torch.tensor(numbers)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return [int(each) for each in found]

    def leave(self) -> None:
        """Leave the other ranks, if this job has joined them: what follows this process does alone."""
        if self._store is not None and dist.is_initialized():
            let_go()
            dist.destroy_process_group()

    @property
    def alone(self) -> bool:
        """Whether what follows concerns no other rank."""
        return not dist.is_available() or not dist.is_initialized()

    def written(self) -> None:
        """Say that log and report are written, which the others may wait for."""
        if self._store is not None and self.first:
            with suppress(Exception):  # nobody may be left to hear it
                self._store.set(_WRITTEN, "")

    def await_report(self) -> None:
        """Wait at the end of this process until the first rank has written its report, but not for long."""
        if self._store is not None and not self.first:
            atexit.register(self._wait)

    def _wait(self) -> None:
        with suppress(Exception):  # the first rank may be the one that is gone
            self._store.wait([_WRITTEN], PATIENCE)

    def why_stopped(self) -> RankError:
        """Return what to say when this process was told to stop, other than by Ctrl-C."""
        assert self.stopped is not None
        return RankError(
            f"Rank {self.rank} was told to stop ({self.stopped.name}): another rank has ended, or the job was stopped.",
            hint="look at what the other ranks say; the first to stop says why.",
        )


@contextmanager
def joined() -> Iterator[Place]:
    """Join the ranks that a launcher such as torchrun has started, or stay alone if there is none.

    In a process that has joined others already, those are the ranks, and they stay joined.

    Raises:
        ConfigError: The environment says that there are several ranks, and not how to find them; or there are more of
            them here than devices.
    """
    if dist.is_available() and dist.is_initialized():
        yield Place(dist.get_rank(), dist.get_world_size())
        return
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Place()
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that there are several ranks, and {missing[0]} is not set.",
            hint="start them with torchrun, or with `wholebatch train --nproc N`; for one process, unset WORLD_SIZE.",
        )
    backend = _choose_device()
    store, rank, ranks = next(iter(rendezvous("env://")))
    dist.init_process_group(backend, store=PrefixStore("wholebatch", store), rank=rank, world_size=ranks)
    place = Place(rank, ranks, store)
    try:
        with _listening(place):
            yield place
    finally:
        place.leave()


def _choose_device() -> str:
    """Take the device of this rank, and return the name of what speaks from it; a CPU can speak in any case."""
    if not torch.accelerator.is_available():
        return "gloo"
    device = torch.accelerator.current_accelerator()
    assert device is not None
    local, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    if local >= devices:
        raise ConfigError(
            f"Rank {os.environ['RANK']} is the {local + 1}th on this machine, which has {devices} of {device.type}.",
            hint=f"start at most {devices} ranks a machine, as in --nproc-per-node {devices}.",
        )
    torch.accelerator.set_device_index(local)
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


@contextmanager
def _listening(place: Place) -> Iterator[None]:
    """Let a place hear the signals to stop. Only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, place.stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
