"""Where are the weights that all ranks share, and how does what a rank has found get there?

A rank commits how far its exploration has come, and gets the center back. Both ways add up the same things; they differ
in when: all ranks at once, by a collective that waits for the slowest (here), or each when it is ready, at a rank that
holds the center and adds in order of arrival (`wholebatch.engine.served`).
"""

from abc import ABC, abstractmethod
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed

from wholebatch.core.errors import ConfigError
from wholebatch.engine.batches import place_among_ranks

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
        """

    @abstractmethod
    def finish(self) -> Vectors:
        """Wait until no rank has anything to add, and return the center, the same for all ranks."""

    @abstractmethod
    def close(self, *, in_peace: bool) -> None:
        """Take down what was set up for this center.

        Args:
            in_peace: Whether to wait for the others; not where this rank has failed.
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

    def start(self, weights: Vectors) -> Vectors:
        self._center = [each.clone() for each in weights]
        if not self._alone:
            for each in self._center:
                distributed.broadcast(each, group=self._process_group, group_src=0)
        return self._center

    def commit(self, found: Vectors | None) -> tuple[Vectors, int]:
        self._announce(1)
        self._add(found)
        return self._center, 0

    def finish(self) -> Vectors:
        while self._announce(0).item() > 0:
            self._add(None)
        return self._center

    def close(self, *, in_peace: bool) -> None:
        pass

    def _announce(self, adding: int) -> Tensor:
        # One number before each sum, so that a rank without rows knows whether another sum is to come.
        number = torch.tensor(adding, device=self._center[0].device)
        if not self._alone:
            distributed.all_reduce(number, group=self._process_group)
        return number

    def _add(self, found: Vectors | None) -> None:
        for place, center in enumerate(self._center):
            part = torch.zeros_like(center) if found is None else found[place]
            if not self._alone:
                distributed.all_reduce(part, group=self._process_group)
            center.add_(part)
