"""Which rows of a prepared loader's last batch come a second time? Those that make all processes equal."""

from collections.abc import Iterable, Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher

from wholebatch.core.batch import Layout
from wholebatch.core.errors import ConfigError


def each_row_once(accelerator: Accelerator, loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of a prepared loader without the rows that come a second time.

    A prepared loader fills up its last batches from the front, so that all processes have equally many
    (``even_batches``). In a mean over targets those rows would count twice.

    Args:
        accelerator: Which has prepared the loader.
        loader: As `prepare` returned it.

    Yields:
        Its batches, on all processes equally many; the last is shorter by what was filled up, or None where nothing is
        left. `Accumulator.updates` and `Accumulator.step` take both.

    Example:
        >>> import torch
        >>> accelerator = Accelerator(cpu=True)
        >>> loader = accelerator.prepare(torch.utils.data.DataLoader(range(5), batch_size=2))
        >>> [len(batch) for batch in each_row_once(accelerator, loader)]
        [2, 2, 1]
    """
    ranks, rank = accelerator.num_processes, accelerator.process_index
    layout = Layout()
    for batch in loader:
        state = accelerator.gradient_state
        if ranks == 1 or not state.end_of_dataloader or state.remainder == 0:
            yield batch
            continue
        if isinstance(loader, DataLoaderDispatcher):  # it cuts a batch of all processes by rows
            items = layout.count(batch) or 0
        else:
            items = loader.total_batch_size // ranks if hasattr(loader, "total_batch_size") else 0
        if not items or (state.remainder < 0 and not getattr(loader, "_drop_last", False)):
            raise _unknown("Nobody knows how many rows there are")
        own = min(items, max(0, state.remainder - rank * items)) if state.remainder > 0 else items
        if 0 < own < items and layout.count(batch) != items:
            raise _unknown(f"The last batch holds {own} rows of its own and {items - own} of the first")
        yield batch if own == items else layout.loaded(batch).take(range(own)) if own else None


def _unknown(found: str) -> ConfigError:
    return ConfigError(
        f"{found}, so that rows which come twice cannot be left out.",
        hint="prepare the loader with even_batches=False, and hand it to accumulator.updates, where processes need not "
        "have equally many: Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=False)).",
    )
