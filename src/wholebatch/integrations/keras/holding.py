"""Which micro-batches does the open window hold?"""

from typing import Any

from wholebatch.integrations.keras.cutting import Held


class Window:
    """Micro-batches that wait until their window is full or the epoch ends.

    Attributes:
        parts: They, in order.
        logs: The metrics after the last update of the epoch; None before the first.
    """

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self.logs: Any = None
        self.compiled: Any = None
        self._left: int | None = None

    def begin(self, micro_batches: int | None) -> None:
        """Begin an epoch of so many micro-batches, or of nobody knows how many."""
        self.parts, self.logs, self._left = [], None, micro_batches

    def take(self, part: Any, length: int) -> Held | None:
        """Take a micro-batch; return the window if that makes `length` of them, or ends the epoch."""
        self.parts.append(part)
        if self._left is not None:
            self._left -= 1
        return self.closed() if len(self.parts) >= length or self._left == 0 else None

    def closed(self) -> Held:
        """Return what the window holds, and leave it empty."""
        parts, self.parts = self.parts, []
        return Held(parts)
