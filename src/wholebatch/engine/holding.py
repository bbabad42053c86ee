"""Whose sum is in ``.grad``? One at a time: the others keep theirs aside."""

import threading
import weakref
from typing import Protocol


class Holder(Protocol):
    """What puts tensors into ``.grad``."""

    def park(self) -> None:
        """Keep what is in ``.grad`` aside."""
        ...

    def unpark(self) -> None:
        """Put back what was kept."""
        ...


class _Held(threading.local):
    """Who holds ``.grad`` in this thread."""

    by: "weakref.ref[Holder] | None" = None


_held = _Held()


def holds(holder: Holder) -> bool:
    """Return whether this one holds ``.grad``."""
    return _held.by is not None and _held.by() is holder


def hold(holder: Holder) -> None:
    """Let this one hold ``.grad`` from now on; the one before keeps what is there aside."""
    before = _held.by() if _held.by is not None else None
    if before is not None and before is not holder:
        before.park()
    holder.unpark()
    _held.by = weakref.ref(holder)


def release(holder: Holder) -> None:
    """Let nobody hold ``.grad``, if this one did."""
    if holds(holder):
        _held.by = None
