"""Is memory getting short, although nothing has failed yet? Another process took some, or an allocator is at its end.

A machine or a control group that runs out kills a process instead of refusing memory, so it is better not to try.
"""

import time
from itertools import pairwise

import torch

from wholebatch.core.budget import say_bytes
from wholebatch.engine import memory
from wholebatch.engine.fit.room import available_bytes

EVERY = 0.1
"""Between two looks at what is free, each of which takes a quarter of a millisecond. Unit: seconds."""

CAREFUL = 0.9
"""What is called free is less than that by a good part, so that a window may take a little more."""

THRASHING = 3
"""So many logical batches on end in which an allocator had to give everything back and ask again are no accident."""


class Watch:
    """Looks at a device between logical batches.

    Args:
        device: Where memory may run out.
        budgeted: Whether a budget was given; then what is free is nobody's concern.

    Attributes:
        free: What was free at the last look, if that was too little. Unit: bytes.
    """

    def __init__(self, device: torch.device, budgeted: bool) -> None:
        self._device = device
        self._budgeted = budgeted
        self._looked = -float("inf")
        self._planned = False
        self._retries = memory.allocation_retries(device)
        self._on_end = 0
        self._seen: list[int] = []
        self.free: int | None = None

    def look_again(self) -> None:
        """Look at the next logical batch, however soon it comes."""
        self._looked = -float("inf")

    def forget(self) -> None:
        """Begin anew: a plan was made."""
        self._planned = True
        self._on_end = 0
        self._seen.clear()
        self._looked = time.monotonic()

    def short(self, takes: int | None) -> str | None:
        """Return why micro-batches should be smaller, or None.

        Args:
            takes: What a window takes above what is there between two; None: nobody knows. Unit: bytes.
        """
        self.free = None
        return self._thrashing() or self._taken(takes)

    def _thrashing(self) -> str | None:
        retries = memory.allocation_retries(self._device)
        if retries is None or self._retries is None:
            return None
        before, self._retries = self._retries, retries
        self._on_end = self._on_end + 1 if retries > before else 0
        if self._on_end < THRASHING:
            return None
        self._on_end = 0
        return (
            f"The allocator had to give its memory back and ask the device again in {THRASHING} logical batches on end "
            f"({retries} times so far), which waits for the device each time"
        )

    def _taken(self, takes: int | None) -> str | None:
        now = time.monotonic()
        if self._budgeted or takes is None or not self._planned or now - self._looked < EVERY:
            return None
        self._looked = now
        free = available_bytes(self._device)
        if CAREFUL * takes > free - self._going(free):  # what the C library keeps for later may be in the way
            memory.release(self._device)
            free = available_bytes(self._device)
        going = self._going(free)
        self._seen = [*self._seen[-1:], free]
        if CAREFUL * takes <= free - going:
            return None
        self.free = free
        less = f", {say_bytes(going)} less from look to look" if going else ""
        return f"Others have taken memory: {say_bytes(free)} are free{less}, and a window takes {say_bytes(takes)}"

    def _going(self, free: int) -> int:
        """What others will take until the next look, if they go on: the least of what they took between the last three.

        What was taken once, as a job takes that begins, is not going on.
        """
        seen = [*self._seen, free]
        return max(0, min(one - other for one, other in pairwise(seen))) if len(seen) == 3 else 0
