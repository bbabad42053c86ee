"""Where are we? The state of one window, and which micro-batch opens and closes it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from wholebatch.core.errors import WindowError
from wholebatch.core.weights import Count

Item = TypeVar("Item")


class Phase(Enum):
    """What has become of a window."""

    OPEN = "open"
    CLOSED = "closed"
    ROLLED_BACK = "rolled back"


@dataclass(slots=True)
class WindowState:
    """Rows, targets and micro-batches of one window so far.

    Attributes:
        phase: Whether the window still takes micro-batches.
        micro_batches: Backward passes so far.
        rows: Rows so far, or None once a micro-batch did not say. Unit: rows.
        targets: Targets so far. Unit: targets.

    Example:
        >>> state = WindowState()
        >>> state.add(rows=2, targets=5)
        >>> state.add(rows=1, targets=0)
        >>> state.rows, state.targets, state.micro_batches
        (3, 5, 2)
    """

    phase: Phase = Phase.OPEN
    micro_batches: int = 0
    rows: int | None = 0
    targets: Count = 0

    def add(self, *, rows: int | None, targets: Count) -> None:
        """Count one micro-batch.

        Args:
            rows: Its rows, or None if unknown. Unit: rows.
            targets: Its targets. Unit: targets.
        """
        self.micro_batches += 1
        self.targets = self.targets + targets
        self.rows = None if rows is None or self.rows is None else self.rows + rows

    def leave_out(self, *, rows: int | None) -> None:
        """Count the rows of a micro-batch from which there is nothing to learn.

        Args:
            rows: Its rows, or None if unknown. Unit: rows.
        """
        self.rows = None if rows is None or self.rows is None else self.rows + rows

    def require_open(self, doing: str) -> None:
        """Raise a `WindowError` unless the window is open.

        Args:
            doing: What the caller was about to do, as in ``"take a loss"``.

        Raises:
            WindowError: The window was closed or rolled back before.
        """
        if self.phase is not Phase.OPEN:
            raise WindowError(
                f"A window cannot {doing} after it was {self.phase.value}.",
                hint="open the next one: window = accumulator.window().",
            )

    def end(self, phase: Phase) -> None:
        """Let the window become one update, or nothing.

        Args:
            phase: `Phase.CLOSED` or `Phase.ROLLED_BACK`.
        """
        self.phase = phase


def group(items: Iterable[Item], micro_batches: int | Callable[[], int]) -> Iterator[tuple[Item | None, bool]]:
    """Walk over a stream and say after which item its window closes.

    Nothing is read ahead, so that a loader's position is that of the window. The tail closes with a last pair that has
    no item, if the stream does not end at the end of a window.

    Args:
        items: Micro-batches, with or without a length.
        micro_batches: Places in a window, or what is asked for them at the first of each window. A micro-batch of None
            takes its place.

    Returns:
        Pairs of an item and whether the window closes after it.

    Raises:
        WindowError: `micro_batches` is no whole number, or less than 1; `items` is nothing to walk over.

    Example:
        >>> list(group("abcde", 2))
        [('a', False), ('b', True), ('c', False), ('d', True), ('e', False), (None, True)]
    """
    if callable(micro_batches):
        return _walk(items, micro_batches)
    check_stream(items, micro_batches)
    return _walk(items, lambda: micro_batches)


def check_number(micro_batches: Any) -> None:
    """Check that a window can have so many micro-batches.

    Raises:
        WindowError: It is no whole number, or none.
    """
    if isinstance(micro_batches, bool) or not hasattr(micro_batches, "__index__"):
        raise WindowError(
            f"micro_batches={micro_batches!r} is no whole number.",
            hint="pass how many micro-batches make one logical batch, such as micro_batches=8.",
        )
    if micro_batches < 1:
        raise WindowError(
            f"A window of {micro_batches} micro-batches would never become an update.",
            hint="pass micro_batches=1 or more.",
        )


def check_stream(items: Any, micro_batches: Any) -> None:
    """Check that a stream can be walked over in windows; raises as `group` does."""
    check_number(micro_batches)
    if isinstance(items, Mapping):
        raise WindowError(
            f"A {type(items).__name__} is no loader of micro-batches.",
            hint="pass what yields it; a single logical batch goes to accumulator.step(batch).",
        )
    if not (hasattr(items, "__iter__") or hasattr(items, "__getitem__")):
        raise WindowError(
            f"A {type(items).__name__} yields no micro-batches.",
            hint="pass a loader: anything that a for loop can walk over.",
        )


def _walk(items: Iterable[Item], micro_batches: Callable[[], int]) -> Iterator[tuple[Item | None, bool]]:
    left = 0
    for item in items:
        left = (left or micro_batches()) - 1
        yield item, left == 0
    if left:
        yield None, True
