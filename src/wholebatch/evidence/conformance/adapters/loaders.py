"""How do micro-batches come to systems that want a DataLoader? An item is a micro-batch, in the given order."""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from wholebatch.evidence.conformance.task import PairTask, Task, join


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


def recut(task: Task, rows: int) -> Task:
    """Return the task with so many rows in each micro-batch, as a loader has it that cuts an epoch by rows."""
    parts = {name: tensor.split(rows) for name, tensor in join(task.epoch).items()}
    return replace(task, epoch=[dict(zip(parts, each, strict=True)) for each in zip(*parts.values(), strict=True)])


class Resumable:
    """A loader of one epoch that knows how far it has come, as torchdata's StatefulDataLoader does."""

    def __init__(self, task: Task) -> None:
        self._items, self._place, self._goes_on = list(task.loader()), 0, False

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        if not self._goes_on:
            self._place = 0
        self._goes_on = False
        while self._place < len(self._items):
            self._place += 1
            yield self._items[self._place - 1]

    def state_dict(self) -> dict[str, int]:
        """Return how many items it has yielded."""
        return {"place": self._place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on, with the next iterator, behind so many items."""
        self._place, self._goes_on = state["place"], True


def data_loader_of_a_rank(task: Task) -> DataLoader[Any]:
    """Return a loader of what this rank sees of an epoch, in the given order, with PyTorch's own sampler for ranks."""
    items = dataset(task)
    sampler: DistributedSampler[Any] = DistributedSampler(items, task.ranks, int(os.environ["RANK"]), shuffle=False)
    return DataLoader(items, batch_size=1, sampler=sampler, collate_fn=only)
