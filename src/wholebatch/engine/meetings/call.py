"""What does a micro-batch bring to a meeting, and from which line of the user's code?"""

import inspect
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wholebatch.core.errors import MeetingError
from wholebatch.core.split import Indices


class Site(NamedTuple):
    """A line of the user's code."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Order:
    """Where the rows of each micro-batch stand in the logical batch.

    Args:
        cut: Rows of each micro-batch, as places in the logical batch; None where nobody knows.
    """

    def __init__(self, cut: Sequence[Indices] | None) -> None:
        self.cut = cut
        self._places: dict[torch.device, Tensor] = {}
        places = list(chain.from_iterable(cut)) if cut is not None else []
        self._sorted = places == list(range(len(places)))

    def sort(self, rows: Tensor) -> Tensor:
        """Return rows that stand micro-batch by micro-batch in the order of the logical batch."""
        if self._sorted or self.cut is None:
            return rows
        if rows.device not in self._places:
            places = torch.tensor(list(chain.from_iterable(self.cut)), device="cpu").argsort()
            self._places[rows.device] = places.to(rows.device, non_blocking=True)
        return rows.index_select(0, self._places[rows.device])


Combine = Callable[[Sequence[Any], Sequence[Any], Order], Any]
"""Makes of the values of all micro-batches, and of what they bring beside them, what each of them gets."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a micro-batch brings to a meeting.

    Attributes:
        kind: What was called, as in ``"wb.gather"``.
        site: Where.
        value: A tensor, or a number.
        combine: Makes the result; a pure function, differentiable in the values.
        beside: What `combine` gets besides, without a gradient.
        once: Called once for all micro-batches with the result and what they bring beside.
        of: The layer that meets, or None.
        with_graph: Whether gradients are wanted.
        part: The checkpointed part of the model that it lies in, if it is known.
    """

    kind: str
    site: Site
    value: Any
    combine: Combine
    beside: Any = None
    once: Callable[[Any, Sequence[Any]], None] | None = None
    of: object = None
    with_graph: bool = True
    part: weakref.ref[Any] | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What must be the same in every micro-batch."""
        return self.kind, self.site, id(self.of)

    def __str__(self) -> str:
        return f"{self.site} ({self.kind})"


def without_value(call: Call) -> Call:
    """Return where a micro-batch meets, without what it brings."""
    return Call(call.kind, call.site, None, call.combine, None, None, call.of, call.with_graph, call.part)


def known_rows(rows: Indices | None) -> Indices:
    """Return where the rows of a micro-batch stand that is one of several.

    Raises:
        MeetingError: Nobody knows.
    """
    if rows is None:
        raise MeetingError(
            "Nobody knows how many rows each micro-batch has, since its tensors disagree, and so not which of all rows "
            "are whose.",
            hint="say which tensors have no rows, as in wb.Accumulator(..., whole=['image']), or on which dimension "
            "they lie, as in dims={'image': 1}.",
        )
    return rows


def checkpointed() -> tuple[weakref.ref[Any] | None, object]:
    """Return the checkpointed part of the model that runs now, and what is another one each time that it is run.

    PyTorch tells nobody: both are what its hooks on saved tensors hold. Where they hold something else, it is None.
    """
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return None, None
    run = inspect.unwrap(hooks[0])
    for cell in getattr(run, "__closure__", None) or ():
        held = cell.cell_contents
        part = held() if isinstance(held, weakref.ref) else held
        if type(part).__name__ == "_CheckpointFrame":
            return weakref.ref(part), run
    return None, None


_ENGINE = Path(__file__).parents[1]
_WITHIN = tuple(os.path.join(folder, "") for folder in (_ENGINE, Path(torch.__file__).parent))  # noqa: PTH118


def site() -> Site:
    """Return the line of the user's code that called, below all frames of the engine and of PyTorch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_WITHIN):
        frame = frame.f_back
    if frame is None:
        return Site("<unknown>", 0)
    return Site(frame.f_code.co_filename, frame.f_lineno)
