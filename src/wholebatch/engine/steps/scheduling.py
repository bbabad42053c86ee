"""When does a learning rate move? Once an applied update, and by nobody else."""

from collections.abc import Sequence
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from wholebatch.core.errors import WindowError

_TIMES = 2
"""After so many updates in a row a step too many is a line left in the loop, and no checkpoint being loaded."""


class Schedules:
    """Steps some schedules, and notices a loop that steps them too.

    Args:
        schedulers: What is stepped once an applied update.
    """

    def __init__(self, schedulers: Sequence[Any]) -> None:
        self._schedulers = schedulers
        self._left: list[Any] = [None] * len(schedulers)
        self._overtaken = 0

    def step(self, loss: float) -> None:
        """Step all of them: one update has been applied.

        Args:
            loss: What a `ReduceLROnPlateau` looks at.
        """
        for scheduler in self._schedulers:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(loss)
            else:
                scheduler.step()
        self._left = list(map(_place, self._schedulers))

    def require_to_be_alone(self) -> None:
        """Raise an error if somebody else has stepped a schedule after each of the last updates.

        Raises:
            WindowError: That is so.
        """
        ahead = [
            scheduler
            for scheduler, left in zip(self._schedulers, self._left, strict=True)
            if left is not None and _place(scheduler) == left + 1
        ]
        self._overtaken = self._overtaken + 1 if ahead else 0
        if self._overtaken >= _TIMES:
            raise WindowError(
                f"The {type(ahead[0]).__name__} was stepped by somebody else after each of the last {_TIMES} updates, "
                "so that the learning rate moves twice an update.",
                hint="leave out scheduler.step(): the accumulator steps lr_scheduler once an update; a schedule that "
                "counts epochs is stepped by your loop alone, without lr_scheduler=...",
            )


def _place(scheduler: Any) -> int | None:
    """How often a schedule has moved, where it tells."""
    place = getattr(scheduler, "last_epoch", None)
    return place if type(place) is int else None
