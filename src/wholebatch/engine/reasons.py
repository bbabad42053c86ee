"""What was chosen automatically, and why? One sentence each, said once."""

import logging
from collections.abc import Callable
from typing import TypeAlias

Say: TypeAlias = Callable[[str, int], None]
"""Takes the reason of an automatic choice, and its level of logging."""


def silent(_reason: str, _level: int) -> None:
    """Keep a reason to oneself."""


_log = logging.getLogger("wholebatch")


class Reasons:
    """The reasons of an accumulator's choices.

    Args:
        said: What has been said already, to be gone on with.

    Attributes:
        said: The sentences, in the order in which they were first said.
    """

    def __init__(self, said: list[str] | None = None) -> None:
        self.said: list[str] = [] if said is None else said

    def __call__(self, reason: str, level: int = logging.INFO) -> None:
        """Keep a reason and log it, unless it has been said."""
        if reason not in self.said:
            self.said.append(reason)
            _log.log(level, reason)
