"""How does an update happen once or not at all when a signal comes in the middle? The signal waits."""

import _signal  # type: ignore[import-not-found]  # what `signal` wraps in enumerations, at ten times the cost
import threading
from typing import Any


class uninterrupted:  # noqa: N801 - reads as what it does
    """Hold Ctrl-C, and every signal that a function of Python handles, back until the end of the block.

    So an update happens once or not at all. Only the main thread can, and needs to: Python delivers signals there.
    """

    def __enter__(self) -> None:
        self._held: list[int] = []
        self._before: list[tuple[int, Any]] = []
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = _signal.getsignal(number)
                if callable(before):
                    self._before.append((number, before))
                    _signal.signal(number, lambda number, _frame: self._held.append(number))

    def __exit__(self, *_error: object) -> None:
        for number, before in self._before:
            _signal.signal(number, before)
        for number in dict.fromkeys(self._held):
            _signal.raise_signal(number)


_SIGNALS = [
    getattr(_signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(_signal, name)
]
"""What tells a run to stop or to save."""
