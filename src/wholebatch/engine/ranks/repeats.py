"""Which rows does a loader give twice, so that all ranks have equally many?"""

import logging
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DistributedSampler

from wholebatch.engine.reasons import Say


def repeated_rows(loader: Any) -> int:
    """Return how many rows come a second time in an epoch, over all ranks, because a sampler makes ranks equal.

    Args:
        loader: A `DataLoader`, or whatever has a ``sampler`` or ``batch_sampler``. Recognised are PyTorch's
            `DistributedSampler`, which Lightning puts in too, and what Accelerate makes of a loader (``even_batches``).

    Returns:
        A number of rows; 0 where none is repeated, and where nothing is known.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> sampler = DistributedSampler(range(10), num_replicas=4, rank=0)
        >>> repeated_rows(DataLoader(range(10), sampler=sampler)), repeated_rows(DataLoader(range(10)))
        (2, 0)
    """
    return max(map(_repeated_by, _samplers(loader)), default=0)


def say_repeated_rows(loader: Any, say: Say) -> None:
    """Say where rows come twice: they count twice, as no mean over targets can tell them from others.

    Args:
        loader: As for `repeated_rows`.
        say: Takes a warning.
    """
    repeated = repeated_rows(loader)
    if repeated:
        rows = "1 row comes" if repeated == 1 else f"{repeated} rows come"
        say(
            f"in each epoch of this loader {rows} twice, to give all ranks equally many, and count twice in the last "
            "update (hint: let wb.LogicalBatches share out the rows, as in DataLoader(data, "
            "batch_sampler=wb.LogicalBatches(len(data), rows=...)); ranks need not have equally many)",
            logging.WARNING,
        )


def _samplers(loader: Any) -> Iterator[Any]:
    ahead, seen = [loader], set()
    while ahead:
        each = ahead.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            ahead += [getattr(each, "batch_sampler", None), getattr(each, "sampler", None)]


def _repeated_by(sampler: Any) -> int:
    if isinstance(sampler, DistributedSampler):
        return 0 if sampler.drop_last else max(0, sampler.total_size - len(sampler.dataset))  # type: ignore[arg-type]
    if type(sampler).__name__ == "BatchSamplerShard" and sampler.even_batches and not sampler.drop_last:  # Accelerate's
        batches = len(sampler) * (1 if sampler.split_batches else sampler.num_processes)
        return max(0, int(batches * sampler.batch_size) - len(sampler.batch_sampler.sampler))
    return 0
