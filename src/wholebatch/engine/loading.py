"""How does a loader that already yields micro-batches become updates? One window after the other, with its tail."""

from collections.abc import Iterable, Iterator
from typing import Any

from wholebatch.core.batch import Layout
from wholebatch.core.errors import MeetingError
from wholebatch.core.record import Update
from wholebatch.core.window import group
from wholebatch.engine.check import FirstCheck
from wholebatch.engine.company import Again, Scout, leave, sit_down
from wholebatch.engine.forward import Forward
from wholebatch.engine.lockstep import Lockstep
from wholebatch.engine.making import Making
from wholebatch.engine.opening import Windows
from wholebatch.engine.window import Window


class Loading:
    """Makes updates from micro-batches as a loader yields them.

    Args:
        windows: Where windows are opened.
        forward: Runs the micro-batches.
        lockstep: Knows whether they meet.
        making: Makes the windows of those that do.
        first_check: Looks at the first batch.
        layout: How rows lie in a micro-batch.
    """

    def __init__(
        self,
        windows: Windows,
        forward: Forward,
        lockstep: Lockstep,
        making: Making,
        first_check: FirstCheck,
        layout: Layout,
    ) -> None:
        self._windows = windows
        self._forward = forward
        self._lockstep = lockstep
        self._making = making
        self._first_check = first_check
        self._layout = layout

    def updates(self, loader: Iterable[Any], micro_batches: int) -> Iterator[Update]:
        """Make updates from a loader; see `wb.Accumulator.updates`."""
        stream = group(loader, micro_batches)
        window: Window | None = None
        held: list[Any] | None = None  # the micro-batches of a window that meet
        unlearned: list[Any] = []  # those without targets, that may have to meet others yet
        scout = Scout() if micro_batches > 1 else None
        try:
            for micro_batch, closes in stream:
                if window is None and held is None:
                    held = [] if micro_batches > 1 and self._lockstep.meets else None
                if window is None and held is None:
                    window = self._windows.open(micro_batches=micro_batches)
                if micro_batch is not None:
                    if micro_batches > 1:
                        self._first_check.look_at_loaded(micro_batch, self._layout)
                    if window is not None:
                        seat = sit_down(scout)
                        try:
                            self._forward.into(window, micro_batch, self._layout.count(micro_batch), None)
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
                if closes:
                    update = window.close() if window is not None else self._make_of(held or [])
                    window, held, unlearned = None, None, []
                    yield update
        except BaseException:
            if window is not None and window.is_open:
                window.rollback()
            raise

    def _make_of(self, held: list[Any]) -> Update:
        return self._making.make_of(held, [self._layout.count(each) for each in held])

    def _require_first(self, window: Window, again: Again) -> None:
        """Undo a window whose first micro-batch has come to a meeting; refuse it if others have run without one."""
        empty = window.is_empty
        self._windows.take_back(window)
        if not empty:
            raise MeetingError(
                f"{again.why}, and an earlier micro-batch of this window ended without meeting.",
                hint="let every micro-batch make the same meetings in the same order.",
            )
        self._lockstep.learn(again)
