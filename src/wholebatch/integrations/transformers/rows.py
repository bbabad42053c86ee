"""Which rows does a logical batch hold? The loader hands them over as they are, and every row comes once."""

import copy
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from torch import Tensor

from wholebatch.core.errors import ConfigError
from wholebatch.engine.fit.lengths import lengths_of


class Held:
    """The rows of one batch of the loader, not collated yet.

    It is no list, so that nobody on the way moves the rows to a device one by one, pins them, or asks for their shapes.

    Args:
        rows: As the dataset gives them.
    """

    __slots__ = ("rows",)

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = list(rows)


class NotCollated:
    """What the loop of the Trainer hands on in the place of a micro-batch: it is no mapping, and says so."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # as copying and pickling ask for
        return self[name]

    def __getitem__(self, name: Any) -> Any:
        raise ConfigError(
            f"training_step looks at {name!r} of its inputs, which are rows of a logical batch, not collated yet.",
            hint="look at inputs in compute_loss, which sees each micro-batch.",
        )


@dataclass(frozen=True, slots=True)
class Taken(NotCollated):
    """What the loader gave for one logical batch.

    Attributes:
        batches: Batches of this rank's loader: rows, or micro-batches that it has collated itself.
        collated: Which of the two; the same on all ranks, also where one has none.
        most: How many batches a rank may have.
    """

    batches: Sequence[Any]
    collated: bool
    most: int

    @property
    def rows(self) -> list[Any]:
        """The rows of all batches."""
        return [row for batch in self.batches for row in batch.rows]


class Waiting(NotCollated):
    """Stands in the loop of the Trainer where it expects a micro-batch before the last of a window."""


WAITING = Waiting()


def take(loader: Iterator[Any], micro_batches: int, device: torch.device) -> list[Any]:
    """Take one logical batch from a loader, in as many places as the Trainer counts.

    Args:
        loader: Of this rank.
        micro_batches: How many batches of the loader make a logical batch; the last of an epoch may have fewer.
        device: Where ranks speak.

    Returns:
        The logical batch in the last place; nothing where no rank has rows left.
    """
    items = list(islice(loader, micro_batches))
    collated = not all(isinstance(item, Held) for item in items)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        # Streams of several ranks may end at different places.
        there = torch.tensor([len(items), collated], device=device)
        dist.all_reduce(there)
        found, collated = (bool(each) for each in there.tolist())
    else:
        found = bool(items)
    return [WAITING] * (micro_batches - 1) + [Taken(items, collated, micro_batches)] if found else []


class RowsOnce(BatchSamplerShard):
    """Shares batches out to ranks, each row once: where Accelerate repeats rows for ranks without, they get none."""

    def __len__(self) -> int:
        batches: int = len(self.batch_sampler)
        ranks: int = self.num_processes
        return batches // ranks if self.drop_last else -(-batches // ranks)

    def __iter__(self) -> Iterator[list[int]]:
        mine: list[int] = []
        place = 0
        for batch in self.batch_sampler:
            mine = batch if place == self.process_index else mine
            place += 1
            if place == self.num_processes:
                yield mine
                mine, place = [], 0
        if place and not self.drop_last:
            yield mine


class StreamOnce(IterableDatasetShard):
    """Shares a stream out to ranks, each row once."""

    def __iter__(self) -> Iterator[Any]:
        plain = self.dataset
        if not hasattr(plain, "set_epoch") and isinstance(getattr(plain, "generator", None), torch.Generator):
            plain.generator.manual_seed(self.epoch)
        start = self.process_index * self.batch_size
        stream = iter(plain)
        while chunk := list(islice(stream, self.batch_size * self.num_processes)):
            if self.drop_last and len(chunk) < self.batch_size * self.num_processes:
                return
            yield from chunk[start : start + self.batch_size]


def share_out(loader: Any) -> Any:
    """Let a loader that Accelerate has shared out to ranks give each row once, and return it."""
    for shard, once in ((getattr(loader, "batch_sampler", None), RowsOnce), (loader.dataset, StreamOnce)):
        if type(shard) is once.__base__ and getattr(shard, "num_processes", 1) > 1:
            shard.__class__ = once  # a loader that has been made takes no other sampler or dataset
    return loader


@contextmanager
def uncollated(trainer: Any) -> Iterator[None]:
    """Let the loaders that a trainer makes hand over rows as they are."""
    options = trainer.accelerator.dataloader_config
    collator, dispatch = trainer.data_collator, options.dispatch_batches
    # The first rank would cut the tensors of a stream for the others; here each takes its rows from the stream.
    trainer.data_collator, options.dispatch_batches = Held, False
    try:
        yield
    finally:
        trainer.data_collator, options.dispatch_batches = collator, dispatch


def longest_first(rows: list[Any]) -> list[Any]:
    """Return rows by their lengths where these can be told: like with like, so that padding nearly vanishes."""
    lengths = lengths_of(rows)
    if lengths is None:
        return rows
    return [rows[place] for place in sorted(range(len(rows)), key=lambda place: -lengths[place])]


class Collate:
    """Collates the rows of one logical batch, each micro-batch once, and keeps count of the input that passes.

    A micro-batch is asked for when its targets are counted, when it passes, and once more where micro-batches meet; and
    a collator may draw random numbers, such as which tokens are masked.

    Args:
        collator: Of the user. Some change the rows that they are given, and a row may be collated again.
        inputs: The name of the model's input.
        keeps: Whether the input itself is kept, until it is counted; else its shape.
    """

    def __init__(self, collator: Callable[[list[Any]], Any], inputs: str, *, keeps: bool) -> None:
        self._collator = collator
        self._inputs = inputs
        self._keeps = keeps
        self._made: dict[tuple[int, ...], Any] = {}
        self._passed: list[tuple[int, Any]] = []

    def __call__(self, rows: list[Any]) -> Any:
        key = tuple(map(id, rows))
        if key not in self._made:
            own = [copy.copy(row) if isinstance(row, MutableMapping) else row for row in rows]
            self._made[key] = self._collator(own)
        micro_batch = self._made[key]
        self._passed.append((len(rows), self.seen(micro_batch)))
        return micro_batch

    def begin(self) -> None:
        """Forget the last logical batch."""
        self._made = {}
        self._passed = []

    def ended(self, rows: int) -> list[Any]:
        """Return what of the inputs was kept of the last pass over all rows of the logical batch."""
        seen = []
        while rows > 0 and self._passed:
            count, each = self._passed.pop()
            rows -= count
            seen.append(each)
        return seen

    def seen(self, micro_batch: Any) -> dict[str, Tensor]:
        """Return what of a micro-batch is counted."""
        kept = {}
        for name in (self._inputs, "attention_mask") if self._keeps else (self._inputs,):
            tensor = micro_batch.get(name) if hasattr(micro_batch, "get") else None
            if isinstance(tensor, Tensor):
                kept[name] = tensor if self._keeps else torch.empty(tensor.shape, device="meta")
        return kept
