"""Where are the weights that all ranks share, and how does what a rank has found get there?

A rank commits how far its exploration has come, and gets the center back. Both ways add up the same things; they differ
in when: all ranks at once, by a collective that waits for the slowest (here), or each when it is ready, at a rank that
holds the center and adds in order of arrival (`wholebatch.engine.ranks.served`).
"""

from abc import ABC, abstractmethod
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed

from wholebatch.core.errors import ConfigError, RankError
from wholebatch.engine.ranks.batches import place_among_ranks

Vectors: TypeAlias = list[Tensor]
"""All weights side by side, one vector for each device and dtype."""


class Center(ABC):
    """The weights that all ranks share."""

    @abstractmethod
    def start(self, weights: Vectors) -> Vectors:
        """Return the weights to start from, the same for all ranks: those of the first.

        Args:
            weights: Those of this rank.
        """

    @abstractmethod
    def commit(self, found: Vectors | None) -> tuple[Vectors, int]:
        """Add what this rank has found, and return the center, and how often others have added to it meanwhile.

        Args:
            found: A change of the weights, or None: this rank adds nothing this time.

        Raises:
            RankError: Another rank has failed.
        """

    @abstractmethod
    def finish(self) -> Vectors:
        """Wait until no rank has anything to add, and return the center, the same for all ranks.

        Raises:
            RankError: Another rank has failed.
        """

    @abstractmethod
    def close(self, failure: str | None = None) -> None:
        """Take down what was set up for this center.

        Args:
            failure: Why this rank goes no further, to be told to the others; None: all have finished.
        """


class Reduced(Center):
    """Every rank holds the center, and all add to it at once; a rank that has finished adds zeros until all have.

    Args:
        process_group: The ranks; None: all of `torch.distributed`, or this process alone.

    Raises:
        ConfigError: torchrun has started several processes that do not know of each other.
    """

    def __init__(self, process_group: Any) -> None:
        self._process_group = process_group
        self._alone = not (distributed.is_available() and distributed.is_initialized())
        ranks = place_among_ranks()[1]
        if self._alone and ranks > 1:
            raise ConfigError(
                f"This process is one of {ranks}, and they have no process group.",
                hint="call torch.distributed.init_process_group() before.",
            )
        self._center: Vectors = []
        self._hears = True  # whether the others can be told anything

    def start(self, weights: Vectors) -> Vectors:
        self._center = [each.clone() for each in weights]
        if not self._alone:
            for each in self._center:
                distributed.broadcast(each, group=self._process_group, group_src=0)
        return self._center

    def commit(self, found: Vectors | None) -> tuple[Vectors, int]:
        self._announce(adding=True)
        self._add(found)
        return self._center, 0

    def finish(self) -> Vectors:
        while self._announce(adding=False):
            self._add(None)
        return self._center

    def close(self, failure: str | None = None) -> None:
        if failure is not None and self._hears:
            self._hears = False
            self._sum(torch.tensor([0, 1], device=self._center[0].device))

    def _announce(self, *, adding: bool) -> bool:
        """Return whether a sum is to come. Told before each, so that ranks without rows, and failures, are known."""
        numbers = torch.tensor([int(adding), 0], device=self._center[0].device)
        self._sum(numbers)
        some, failed = numbers.tolist()
        if failed:
            self._hears = False
            raise another_failed("one of them says so, and its own output says why")
        return bool(some)

    def _add(self, found: Vectors | None) -> None:
        for place, center in enumerate(self._center):
            part = torch.zeros_like(center) if found is None else found[place]
            self._sum(part)
            center.add_(part)

    def _sum(self, numbers: Tensor) -> None:
        if not self._alone:
            hears, self._hears = self._hears, False  # not if this comes to no end
            distributed.all_reduce(numbers, group=self._process_group)
            self._hears = hears


def another_failed(why: str) -> RankError:
    """Return the error of a rank that cannot go on without another."""
    return RankError(
        f"Ranks that explore together have lost one: {why}.",
        hint="start all of them again, from the last weights that were saved after finish().",
    )
