"""How far does a meeting reach? Over the micro-batches of this process, or over those of all ranks (`far.py`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from wholebatch.core.split import Indices
from wholebatch.engine.meetings.company import Call, Order


@dataclass(frozen=True, slots=True)
class Brought:
    """What all micro-batches bring to a meeting, those of other ranks among them.

    Attributes:
        values: In the order of ranks and micro-batches.
        beside: What each brings besides.
    """

    values: Sequence[Any]
    beside: Sequence[Any]


class Reach(Protocol):
    """The micro-batches that meet.

    Attributes:
        order: Where the rows of all of them stand in the logical batch.
        rows: Where those of this process stand; None: nobody knows, or there are no others.
    """

    order: Order
    rows: Sequence[Indices | None]

    @property
    def ranks(self) -> int:
        """How many processes have micro-batches that meet."""
        ...

    def open(self) -> None:
        """Begin."""
        ...

    def hear(self, calls: Sequence[Call], values: Sequence[Any], *, graph: bool) -> Brought:
        """Return what all micro-batches bring to a meeting.

        Args:
            calls: Of the micro-batches of this process.
            values: What they bring.
            graph: Whether the gradient of what other ranks get is to come back in the backward pass.
        """
        ...

    def add_up(self, gradient: Tensor | None, like: Tensor) -> Tensor | None:
        """Return the sum of what all micro-batches give for a meeting; None: nobody gives anything.

        Args:
            gradient: What those of this process give, or None.
            like: What the meeting came to.
        """
        ...

    def end(self) -> None:
        """Say that the forward passes of this process are done."""
        ...

    def say_again(self, why: str) -> None:
        """Tell the others that the graphs have to be joined after all."""
        ...

    def roots(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return where the backward pass has to begin besides, and the gradients that enter there."""
        ...

    def close(self) -> None:
        """Say that this process needs nothing more from the others."""
        ...


class Near:
    """Only the micro-batches of this process.

    Args:
        cut: Where their rows stand in the logical batch; None: nobody knows.
        micro_batches: How many there are.
    """

    ranks = 1

    def __init__(self, cut: Sequence[Indices] | None, micro_batches: int) -> None:
        self.order = Order(cut)
        self.rows: Sequence[Indices | None] = cut if cut is not None else [None] * micro_batches

    def hear(self, calls: Sequence[Call], values: Sequence[Any], *, graph: bool) -> Brought:  # noqa: ARG002
        return Brought(values, [call.beside for call in calls])

    def add_up(self, gradient: Tensor | None, like: Tensor) -> Tensor | None:  # noqa: ARG002
        return gradient

    def open(self) -> None:
        pass

    def end(self) -> None:
        pass

    def say_again(self, why: str) -> None:
        pass

    def roots(self) -> tuple[list[Tensor], list[Tensor]]:
        return [], []

    def close(self) -> None:
        pass
