"""How do micro-batches come to systems that want a DataLoader? An item is a micro-batch, in the given order."""

import os
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from wholebatch.evidence.conformance.task import PairTask, Task


class Unsized(IterableDataset[Any]):
    """An epoch whose length nobody knows."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __iter__(self) -> Iterator[Any]:
        return self._task.loader()


def only(parts: list[Any]) -> Any:
    """Return the only element: the collate function of a loader whose items are micro-batches already."""
    (part,) = parts
    return part


def dataset(task: Task | PairTask) -> Any:
    """Return the items of one epoch: a list, or an iterable without a length."""
    if isinstance(task, PairTask):
        return list(task.epoch)
    return list(task.loader()) if task.sized else Unsized(task)


def data_loader(task: Task | PairTask) -> DataLoader[Any]:
    """Return a loader of one epoch, of all ranks."""
    return DataLoader(dataset(task), batch_size=1, shuffle=False, collate_fn=only)


def data_loader_of_a_rank(task: Task) -> DataLoader[Any]:
    """Return a loader of what this rank sees of an epoch, in the given order, with PyTorch's own sampler for ranks."""
    items = dataset(task)
    sampler: DistributedSampler[Any] = DistributedSampler(items, task.ranks, int(os.environ["RANK"]), shuffle=False)
    return DataLoader(items, batch_size=1, sampler=sampler, collate_fn=only)
