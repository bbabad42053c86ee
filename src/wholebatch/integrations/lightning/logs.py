"""What is logged, and in whose name? What a pass of no update logs is nothing, and metrics are put back after it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Silence:
    """A context in which a module logs nothing. Micro-batches that meet may be in it side by side.

    Args:
        module: A `LightningModule`; metrics of torchmetrics in it are afterwards as they were.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._inside = 0
        self._metrics: list[tuple[Any, dict[str, Any]]] = []

    def __enter__(self) -> None:
        if not self._inside:
            self._metrics = [
                (each, _state_of(each)) for each in self._module.modules() if hasattr(each, "_update_count")
            ]
        self._inside += 1
        self._module.log = self._module.log_dict = lambda *_arguments, **_options: None

    def __exit__(self, *_: object) -> None:
        self._inside -= 1
        if self._inside:
            return
        del self._module.log, self._module.log_dict
        for metric, state in self._metrics:
            for name, value in state.items():
                setattr(metric, name, value)
        self._metrics = []


@contextmanager
def current_hook(module: Any, hook: str) -> Iterator[None]:
    """Let a module know in which hook it is, as it asks when something is logged."""
    before, module._current_fx_name = module._current_fx_name, hook
    try:
        yield
    finally:
        module._current_fx_name = before


@contextmanager
def logging_of(trainer: Any, micro_batch: Any) -> Iterator[None]:
    """Let what is logged be weighted by the rows of a micro-batch."""
    results = trainer._results
    before = results.batch
    results.batch, results.batch_size = micro_batch, None
    try:
        yield
    finally:
        results.batch, results.batch_size = before, None


def _state_of(metric: Any) -> dict[str, Any]:
    names = [*getattr(metric, "_defaults", ()), "_update_count", "_computed", "_forward_cache"]
    return {name: _copied(getattr(metric, name)) for name in names if hasattr(metric, name)}


def _copied(value: Any) -> Any:
    """A metric adds to a tensor in place or not, and appends to a list."""
    if isinstance(value, list):
        return list(value)
    return value.clone() if hasattr(value, "clone") else value
