"""Which ranks have micro-batches left, where each reads a loader of its own and not all are equally long?"""

from wholebatch.engine.ranks.message import Ending, Heard


class Streams:
    """The micro-batches that ranks read side by side.

    Args:
        several: Whether there are other ranks.

    Attributes:
        ended: Set where this process has no micro-batch left after the window that is open.
        idle: Set where it has none in that window either.
        all_ended: Whether there are others, and all had said at the end of the last window that they have no more.
        all_idle: Whether none of them had a micro-batch in it.
    """

    __slots__ = ("all_ended", "all_idle", "ended", "idle", "several")

    def __init__(self, *, several: bool) -> None:
        self.several = several
        self.begin()

    def begin(self) -> None:
        """Begin to read: as far as is known, each rank has some."""
        self.ended = self.idle = self.all_ended = self.all_idle = False

    @property
    def others_go_on(self) -> bool:
        """Whether there are others, and some may have more."""
        return self.several and not self.all_ended

    @property
    def ending(self) -> Ending:
        """What this rank says of its own at the end of a window."""
        return Ending(self.ended, self.idle)

    def hear(self, heard: Heard) -> None:
        """Take in what all ranks have said of theirs."""
        self.all_ended, self.all_idle = heard.all_ended, heard.all_idle
