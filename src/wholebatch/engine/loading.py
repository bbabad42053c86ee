"""How does a loader that already yields micro-batches become updates? One window after the other, with its tail."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from wholebatch.core.batch import Layout, LogicalBatch
from wholebatch.core.errors import MeetingError, RankError
from wholebatch.core.record import Update
from wholebatch.core.schedules.schedule import Schedule
from wholebatch.core.window import check_stream, group
from wholebatch.engine import memory
from wholebatch.engine.checks.check import FirstCheck
from wholebatch.engine.fit.cutting import Shortage
from wholebatch.engine.fit.share import no_finer
from wholebatch.engine.fit.splitting import Splitting
from wholebatch.engine.forward import Forward
from wholebatch.engine.held import Held
from wholebatch.engine.making import Making
from wholebatch.engine.meetings.company import Again, leave, sit_down
from wholebatch.engine.meetings.lockstep import Lockstep
from wholebatch.engine.meetings.singly import Scout
from wholebatch.engine.opening import Windows
from wholebatch.engine.window import Window


class Places:
    """How many micro-batches make each window: always as many, or by a schedule.

    Args:
        micro_batches: As for `wb.Accumulator.updates`.
        windows: Count what came before.

    Attributes:
        now: Those of the window that is made.
        loader: What yields them.
    """

    def __init__(self, micro_batches: int | Schedule, windows: Windows) -> None:
        self._schedule = micro_batches if isinstance(micro_batches, Schedule) else None
        self._windows = windows
        self._read = 0
        self.loader: Any = None
        self.now: Any = micro_batches if self._schedule is None else self._schedule.ask(windows.made)

    def first(self) -> int:
        """Return how many places there are, at the first of them."""
        return int(self.now)

    def counted(self, loader: Any) -> Any:
        """Return the micro-batches of a loader; where a schedule asks, they are counted."""
        self.loader = loader
        return loader if self._schedule is None else self._count(loader)

    def turn(self) -> None:
        """Look how many make the next window."""
        self._read = 0
        if self._schedule is not None:
            self.now = self._schedule.ask(self._windows.made)

    def note(self, update: Update, *, tail: bool) -> None:
        """Tell the schedule what came of a window. Of a tail, no rank knows how many micro-batches others had.

        Args:
            update: Its record.
            tail: Whether all ranks are at their end.
        """
        if self._schedule is not None and not tail:
            several = self._windows.rules.setup.group.ranks > 1
            self._schedule.note(update, size=self.now if several else self._read)

    def _count(self, loader: Iterable[Any]) -> Iterator[Any]:
        for micro_batch in loader:
            self._read += 1
            yield micro_batch


class Loading:
    """Makes updates from micro-batches as a loader yields them.

    Args:
        windows: Where windows are opened.
        forward: Runs the micro-batches.
        lockstep: Knows whether they meet.
        making: Makes the windows of those that do.
        first_check: Looks at the first batch.
        splitting: Runs those that do not meet, in parts where memory runs out.
        layout: How rows lie in a micro-batch.
    """

    def __init__(
        self,
        windows: Windows,
        forward: Forward,
        lockstep: Lockstep,
        making: Making,
        first_check: FirstCheck,
        splitting: Splitting,
        layout: Layout,
    ) -> None:
        self._windows = windows
        self._forward = forward
        self._lockstep = lockstep
        self._making = making
        self._first_check = first_check
        self._splitting = splitting
        self._layout = layout

    def updates(self, loader: Iterable[Any], micro_batches: int | Schedule) -> Iterator[Update]:
        """Make updates from a loader; see `wb.Accumulator.updates`."""
        places = Places(micro_batches, self._windows)
        check_stream(loader, places.now)
        ranks = self._windows.rules.setup.group
        stream = self._stream(places.counted(loader), places)
        update: Update | None = None
        while update is None or not ranks.streams.all_ended:
            places.turn()
            with ranks.together(self._windows.renew_sums):
                ranks.expect_meeting(self._lockstep.meets)
                update = self._next(stream, places.now)
            if update is None:
                return
            places.note(update, tail=ranks.streams.all_ended)
            yield update
        for _ in stream:  # so that the loader, too, comes to its end
            raise RankError(
                "A loader yields more micro-batches than its length says, after all ranks had come to their end.",
                hint="let len(loader) be right, or hand in iter(loader), whose length is not asked.",
            )

    def add(self, window: Window, micro_batch: Any, last: bool) -> None:
        """Add a micro-batch to a window of somebody else's loop; see `wb.Accumulator.add`."""
        if window.is_empty:
            self._splitting.closed()
        if micro_batch is None:
            return
        self._first_check.look_at_loaded(micro_batch, self._layout)
        if last:
            window.expect_last()
        with self._windows.rules.setup.group.apart():  # in the loop of somebody else others may be at another place
            self._splitting.into(window, micro_batch)

    def _stream(self, loader: Iterable[Any], places: "Places") -> Iterator[tuple[Any, bool]]:
        """The micro-batches of this process, and empty windows for as long as other ranks have more."""
        streams = self._windows.rules.setup.group.streams
        length = _known_length(places.loader)
        streams.begin()

        def read() -> Iterator[Any]:
            for number, micro_batch in enumerate(loader, 1):
                streams.ended = number == length
                yield micro_batch
            streams.ended = True

        yield from group(read() if streams.several else loader, places.first)
        streams.idle = True
        while streams.others_go_on:
            yield None, True

    def _next(self, stream: Iterator[tuple[Any, bool]], micro_batches: int) -> Update | None:
        """Make the next window; None where no rank has a micro-batch left."""
        ranks, several = self._windows.rules.setup.group, micro_batches > 1
        alone = not several and ranks.ranks == 1
        # The micro-batches of a window that meet, or of which there is one.
        meets = self._lockstep.meets and (several or ranks.ranks > 1)
        # An optimizer that takes gradients in as they arrive needs the targets of all before the first backward pass.
        held = Held() if alone or meets or self._windows.rules.sums.consumes else None
        unlearned = Held()  # those without targets, that may have to meet others yet
        retries = 0
        scout = Scout() if several or ranks.ranks > 1 else None
        window: Window | None = None
        try:
            for micro_batch, closes in stream:
                if window is None and held is None:
                    window = self._windows.open(micro_batches=micro_batches)
                    passes = 0 if ranks.streams.idle else micro_batches
                    self._forward.agree(window, passes, [] if micro_batch is None else [micro_batch])
                    window.steps_again = True
                if micro_batch is not None:
                    if several:
                        self._first_check.look_at_loaded(micro_batch, self._layout)
                    if window is not None:
                        seat = sit_down(scout)
                        try:
                            if closes:
                                window.expect_last()
                            retries += self._splitting.into(window, micro_batch)
                            if window.is_empty and scout is not None:
                                unlearned.append(micro_batch)
                        except Again as again:
                            self._require_first(window, again)
                            window, held = None, unlearned
                        finally:
                            leave(seat)
                    if held is not None:
                        held.append(micro_batch)
                    del micro_batch
                if closes and window is not None:
                    self._forward.fill(window)
                if closes:
                    update = self._closed(window, unlearned) if window is not None else self._make_of(held)
                    self._splitting.closed()
                    if not ranks.streams.all_idle:
                        return replace(update, retries=update.retries + retries) if retries else update
                    self._windows.take_back(window)
                    return None
        except BaseException:
            if window is not None and window.is_open:
                window.rollback()
            raise
        return None

    def _make_of(self, all_held: Held | None) -> Update:
        """Make the update of micro-batches that are all there, in parts where they do not fit."""
        held = all_held.all() if all_held is not None else []
        retries = 0
        rows = [self._layout.count(each) for each in held]
        taken: list[LogicalBatch] = []
        while True:
            if not taken and not self._splitting.splits(rows):
                made = self._making.attempt_of(held, rows)
            else:
                taken = taken or [self._layout.loaded(each) for each in held]
                made = self._made_in_parts(taken)
            if isinstance(made, Update):
                return replace(made, retries=retries) if retries else made
            memory.free_cached(self._windows.rules.setup.device)
            retries += 1
            if made.elsewhere:
                continue
            if not held:
                raise no_finer("on a rank without rows", made.said)
            taken = taken or [self._splitting.rows_of(each, made.said) for each in held]
            at_once = max(len(part) for each in taken for part in self._splitting.parts(each))
            self._splitting.take_finer(max(taken, key=lambda each: each.rows), made.rows or at_once, made.said)
            self._windows.rules.setup.group.report_shortage(made.said, self._splitting.size)

    def _made_in_parts(self, taken: list[LogicalBatch]) -> Update | Shortage:
        if len(taken) == 1:
            return self._making.attempt(taken[0], self._splitting.parts(taken[0]), None)
        parts = [(each, part) for each in taken for part in self._splitting.parts(each)]
        return self._making.attempt_of([each.take(part) for each, part in parts], [len(part) for _, part in parts])

    def _require_first(self, window: Window, again: Again) -> None:
        """Undo a window whose first micro-batch has come to a meeting; refuse it if others have run without one."""
        empty = window.is_empty
        self._windows.take_back(window)
        if not empty:
            raise MeetingError(
                f"{again.why}, and an earlier micro-batch of this window ended without meeting.",
                hint="let every micro-batch make the same meetings in the same order.",
            )
        self._learn(again)

    def _closed(self, window: Window, unlearned: Held) -> Update:
        """Close a window; where other ranks meet, make it again with them, from what had no targets."""
        empty = window.is_empty
        try:
            return window.close()
        except Again as again:
            heard = again
        if not empty:
            raise MeetingError(
                f"{heard.why} on another rank, and the micro-batches of this one ended without meeting.",
                hint="let every micro-batch on every rank make the same meetings in the same order.",
            )
        self._windows.take_back(window)
        self._learn(heard)
        return self._make_of(unlearned)

    def _learn(self, again: Again) -> None:
        self._lockstep.learn(again)
        if not again.heard:
            self._windows.rules.setup.group.report_meeting(again.why)


def _known_length(loader: Any) -> int | None:
    """How many micro-batches a loader yields, where that can be relied on."""
    if isinstance(loader, list | tuple):
        return len(loader)
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        return len(loader)
    return None
