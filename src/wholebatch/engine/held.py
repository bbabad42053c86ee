"""Which micro-batches of a window are needed at the same time, and are they still what the loader has yielded?"""

from typing import Any

from wholebatch.core.errors import WindowError
from wholebatch.engine.versions import Versions


class Held:
    """Micro-batches of one window, kept until all are there.

    A loader may fill the same tensors again and again, which is right where each micro-batch is used up before the next
    one is asked for, and here would leave as many times the last one.
    """

    def __init__(self) -> None:
        self._micro_batches: list[Any] = []
        self._versions: list[Versions] = []

    def append(self, micro_batch: Any) -> None:
        """Keep one more, as it is now."""
        self._micro_batches.append(micro_batch)
        self._versions.append(Versions(micro_batch))

    def all(self) -> list[Any]:
        """Return all of them.

        Raises:
            WindowError: One has been written into since it was kept.
        """
        if not all(each.are_those_of_now for each in self._versions):
            raise WindowError(
                "The loader has written into a micro-batch that it had yielded before, and the micro-batches of this "
                "window are needed at the same time: they meet, or an optimizer has to know the targets of all.",
                hint="let it yield new tensors each time, or copies: {name: x.clone() for name, x in buffers.items()}.",
            )
        return self._micro_batches
