"""Is the loss function run for an update, or only to look at what it does?"""

from collections.abc import Iterator
from contextlib import contextmanager

_depth = [0]  # of the process, not of a thread: micro-batches that meet have threads of their own


def is_rehearsal() -> bool:
    """Return whether the loss function is being run for a check or a plan, so that what it logs is of no update."""
    return _depth[0] > 0


@contextmanager
def rehearsal() -> Iterator[None]:
    """The context of a check or a plan."""
    _depth[0] += 1
    try:
        yield
    finally:
        _depth[0] -= 1
