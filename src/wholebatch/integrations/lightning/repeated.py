"""Which rows of a rank's last batch come a second time? Those with which a sampler makes all ranks equal."""

import logging
from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from wholebatch.core.batch import Layout
from wholebatch.engine.reasons import Say


class Repeated:
    """Leaves out what a `DistributedSampler` gives twice, as the trainer's own does: it counts once, in a mean.

    Args:
        loaders: From which the trainer reads.
        layout: How rows lie in a batch.
        say: Takes the reason.
    """

    def __init__(self, loaders: Sequence[Any], layout: Layout, say: Say) -> None:
        self._layout = layout
        self._say = say
        self._last = -1
        self._items = self._own = 0
        if len(loaders) == 1 and isinstance(loaders[0], DataLoader):
            self._look_at(loaders[0])

    def _look_at(self, loader: DataLoader[Any]) -> None:
        sampler = loader.sampler
        if (
            not isinstance(sampler, DistributedSampler)
            or sampler.drop_last
            or loader.drop_last
            or not loader.batch_size
        ):
            return
        rows, ranks = len(sampler.dataset), sampler.num_replicas  # type: ignore[arg-type]
        own = max(0, -(-(rows - sampler.rank) // ranks))
        self._last = len(loader) - 1
        self._items = len(sampler) - self._last * loader.batch_size
        self._own = max(0, self._items - (len(sampler) - own))

    def left_out(self, batch: Any, batch_idx: int) -> Any:
        """Return a batch without what it holds a second time; None if nothing is left.

        Args:
            batch: As the trainer hands it to `training_step`.
            batch_idx: Which of the epoch it is.
        """
        if batch_idx != self._last or self._own == self._items:
            return batch
        repeated = self._items - self._own
        rows = f"{repeated} row{'s' * (repeated > 1)}"
        listed = self._layout.collate is not None
        if self._own and not listed and self._layout.count(batch) != self._items:
            self._say(
                f"The sampler gives {rows} of this rank's last batch twice, and it cannot be cut: they count twice.",
                logging.WARNING,
            )
            return batch
        self._say(
            f"The sampler gives {rows} of this rank's last batch twice: left out, so that each counts once.",
            logging.INFO,
        )
        if not self._own:
            return None
        return batch[: self._own] if listed else self._layout.loaded(batch).take(range(self._own))
