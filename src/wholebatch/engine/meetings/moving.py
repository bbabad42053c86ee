"""When do running statistics move that a meeting has shown? Those of the model at once, since its window keeps copies.

A layer of another model, such as the generator in the loss of a discriminator, has nobody who would put them back: it
waits until the micro-batches have run, and keeps what it has where they fail or are only looked at.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from wholebatch.engine.device import modules
from wholebatch.engine.meetings.call import Call


class Moving:
    """What meetings do once for all micro-batches.

    Args:
        model: Whose layers are put back if need be.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._inside: set[int] | None = None
        self._waiting: list[Callable[[], None]] = []

    def once(self, call: Call, result: Any, beside: Sequence[Any]) -> None:
        """Do what a meeting does once, or let it wait."""
        if call.once is None:
            return
        if self._inside is None:
            self._inside = {id(each) for each in modules(self._model)}
        result = result.detach() if isinstance(result, Tensor) else result
        if id(call.of) in self._inside:
            call.once(result, beside)
        else:
            self._waiting.append(partial(call.once, result, beside))

    def end(self) -> None:
        """Do what waited: the micro-batches have run."""
        for each in self._waiting:
            each()
        self._waiting.clear()
