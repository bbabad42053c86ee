"""Which loss does the log show? That of the logical batches since the last entry; a window without targets has none."""

import math
from statistics import fmean

from wholebatch.core.record import Update


class Losses:
    """The losses of the windows since the last entry of the log."""

    def __init__(self) -> None:
        self._mean = 0.0
        self._number = 0
        self._since: list[float] = []

    def add(self, update: Update) -> float:
        """Add a window, and return what the Trainer adds to its sum.

        Returns:
            The loss; where it is not finite or there is none, the mean of the others, so that the mean over the run is
            theirs.
        """
        if update.targets:
            self._since.append(update.loss)
        if not math.isfinite(update.loss):
            return self._mean
        self._number += 1
        self._mean += (update.loss - self._mean) / self._number
        return update.loss

    def shown(self, logs: dict[str, float], *, keep_infinite: bool) -> dict[str, float]:
        """Return an entry of the log with the loss of the windows since the last, or without one where none has any.

        Args:
            logs: As the Trainer made it.
            keep_infinite: Whether losses that are not finite count.
        """
        losses = [loss for loss in self._since if keep_infinite or math.isfinite(loss)]
        self._since = []
        rest = {name: value for name, value in logs.items() if name != "loss"}
        return {"loss": fmean(losses), **rest} if losses else rest
