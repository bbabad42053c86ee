"""Where do micro-batches meet? Collectives over the whole logical batch, for any layer and any loss.

Micro-batches are virtual ranks. What a model does across devices with collectives it does across micro-batches with the
same words: each brings what it has, and each gets what all brought. Who else is there is not the caller's business: it
is the `Company` of the thread that runs the micro-batch.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from numbers import Real
from types import FrameType
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from wholebatch.core.errors import MeetingError
from wholebatch.core.split import Indices

Summed = TypeVar("Summed", Tensor, int, float)


def gather(x: Tensor) -> Tensor:
    """Return the rows of the whole logical batch, of which `x` has those of this micro-batch.

    They stand in the order in which the batch was given, however it was cut, and gradients flow back to every row's
    micro-batch. Outside an accumulator, in evaluation, and where a batch is not cut, the rows of `x` are all rows.

    Args:
        x: One entry a row of the micro-batch, on the first dimension; the other dimensions are the same in every
            micro-batch. Shape ``[rows, ...]``.

    Returns:
        Shape ``[rows of the logical batch, ...]``. To be read, not changed in place.

    Raises:
        MeetingError: Another micro-batch does not come to this place, shapes do not fit, or micro-batches come one by
            one, as in a window of your own.

    Example:
        >>> import wholebatch as wb
        >>> model = torch.nn.Linear(3, 2)
        >>> def loss_fn(model, x):
        ...     mine = model(x)
        ...     everyone = wb.gather(mine)
        ...     return torch.nn.functional.cross_entropy(mine @ everyone.T, wb.own_rows(mine))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> accumulator = wb.Accumulator(model, optimizer, loss_fn, micro_batch=wb.Rows(2))
        >>> accumulator.step(torch.randn(6, 3)).micro_batches
        3
    """
    return meet("wb.gather", x, _rows_in_order)  # type: ignore[no-any-return]


def sum_over_batch(x: Summed) -> Summed:
    """Return the sum of `x` over all micro-batches of the logical batch.

    Any statistic that is a sum over rows becomes that of the whole batch: sum it over the rows that are here, then over
    the batch. Gradients flow back to every micro-batch. Outside an accumulator it is `x`.

    Args:
        x: A tensor of the same shape in every micro-batch, or a number, such as the rows that are here.

    Returns:
        The sum, in the dtype of `x`; a bool is counted.

    Raises:
        MeetingError: As for `gather`.

    Example:
        >>> import wholebatch as wb
        >>> x = torch.tensor([1.0, 2.0, 6.0])
        >>> wb.sum_over_batch(x.sum()) / wb.sum_over_batch(len(x))  # the mean of the whole batch, wherever it is cut
        tensor(3.)
    """
    return meet("wb.sum_over_batch", x, _sum)  # type: ignore[no-any-return]


def own_rows(x: Tensor) -> Tensor:
    """Return which of the gathered rows are those of this micro-batch: the places of `x` in ``wb.gather(x)``.

    Args:
        x: What is gathered, or anything else with one entry a row of the micro-batch; only its length and device
            matter.

    Returns:
        Places, in the order of `x`; shape ``[rows]``, int64, on the device of `x`.

    Raises:
        MeetingError: `x` has not one entry a row, or nobody knows how many rows a micro-batch has.

    Example:
        >>> import wholebatch as wb
        >>> wb.own_rows(torch.zeros(3, 8))
        tensor([0, 1, 2])
    """
    company = here()
    own = company.own_rows() if company is not None else None
    if own is None:
        return torch.arange(len(x), device=x.device)
    if len(own) != len(x):
        raise _wrong_rows("wb.own_rows", len(x), len(own))
    if isinstance(own, range):
        return torch.arange(own.start, own.stop, device=x.device)
    return torch.tensor(own, device=x.device)


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
    """

    kind: str
    site: Site
    value: Any
    combine: Combine
    beside: Any = None
    once: Callable[[Any, Sequence[Any]], None] | None = None
    of: object = None
    with_graph: bool = True

    @property
    def key(self) -> tuple[object, ...]:
        """What must be the same in every micro-batch."""
        return self.kind, self.site, id(self.of)

    def __str__(self) -> str:
        return f"{self.site} ({self.kind})"


def without_value(call: Call) -> Call:
    """Return where a micro-batch meets, without what it brings."""
    return replace(call, value=None, beside=None, once=None)


def meet(
    kind: str,
    value: Any,
    combine: Combine,
    *,
    beside: Any = None,
    once: Callable[[Any, Sequence[Any]], None] | None = None,
    of: object = None,
) -> Any:
    """Bring a value to a meeting of all micro-batches, and return what `combine` makes of all values.

    Without company the value is returned as it is. The arguments are those of `Call`.
    """
    company = here()
    if company is None:
        return value
    return company.meet(Call(kind, _site(), value, combine, beside, once, of, torch.is_grad_enabled()))


def combined(calls: Sequence[Call], values: Sequence[Any], order: Order) -> Any:
    """Return what a meeting makes of some values. The rows of other ranks would join here, and only here."""
    return calls[0].combine(values, [call.beside for call in calls], order)


class Company(Protocol):
    """Who else is there, for the micro-batch that runs in this thread."""

    def meet(self, call: Call) -> Any:
        """Return what a meeting makes of what this micro-batch and all others bring."""
        ...

    def own_rows(self) -> Indices | None:
        """Where the rows of this micro-batch stand among all; None: they are all."""
        ...


class Again(BaseException):
    """Ends an attempt at a window that has to be made in another way. It leaves no accumulator.

    Args:
        why: What was found, as a sentence.
        joined: Whether the graphs of the micro-batches have to be joined.
    """

    def __init__(self, why: str, *, joined: bool = False) -> None:
        super().__init__(why)
        self.why = why
        self.joined = joined


@dataclass(slots=True)
class Alone:
    """Nobody else: the rows that are here are all. It is noted where somebody would have met."""

    met: list[Call] = field(default_factory=list)

    def meet(self, call: Call) -> Any:
        self.met.append(call)
        result = combined([call], [call.value], Order(None))
        if call.once is not None:
            call.once(result, [call.beside])
        return result

    def own_rows(self) -> Indices | None:
        return None


@dataclass(slots=True)
class Scout:
    """The first of several micro-batches that run as if they were alone: it ends where they would have to meet."""

    ended: Again | None = None

    def meet(self, call: Call) -> Any:
        self.ended = Again(f"The micro-batches meet at {call}")
        raise self.ended

    def own_rows(self) -> Indices | None:
        self.ended = Again("The micro-batches ask for the places of their rows")
        raise self.ended

    def require_alone(self) -> None:
        """Raise what has ended the micro-batch, if the user's code has caught it."""
        if self.ended is not None:
            raise self.ended


@dataclass(slots=True)
class OneByOne:
    """A window whose micro-batches come one by one, so that only a single one is its whole batch."""

    micro_batches: int = 0
    _met: Call | None = None

    def meet(self, call: Call) -> Any:
        if not call.with_graph:  # an evaluation inside an open window
            return Alone().meet(call)
        self._met = call
        self._require_one()
        return Alone().meet(call)

    def own_rows(self) -> Indices | None:
        return None

    def take_one(self) -> None:
        """Count a micro-batch.

        Raises:
            MeetingError: It is the second one, and they would have had to meet.
        """
        self._require_one()
        self.micro_batches += 1

    def _require_one(self) -> None:
        if self._met is not None and self.micro_batches > 0:
            raise MeetingError(
                f"The micro-batches of this window would have to meet at {self._met}, and they come one by one: each "
                "is gone before the next one runs.",
                hint="hand the logical batch to accumulator.step(batch), or the loader to accumulator.updates(loader, "
                "micro_batches=n); a window of your own can meet only in a single micro-batch.",
            )


class Seat:
    """Some company, from when it comes until it leaves."""

    __slots__ = ("company",)

    def __init__(self, company: Company | None) -> None:
        self.company: Company | Literal["left"] | None = company


class _Here(threading.local):
    def __init__(self) -> None:
        self.seats: list[Seat] = []


_here = _Here()
_in_backward: list[Company] = []
"""Whom a recomputation meets that a backward pass starts, in whichever thread; at most one."""


def here() -> Company | None:
    """Return who else is there for the micro-batch that runs in this thread, or None outside of any."""
    seats = _here.seats
    while seats and seats[-1].company == "left":
        seats.pop()
    company = seats[-1].company if seats else None
    if company is None and _in_backward and torch._C._current_graph_task_id() != -1:
        return _in_backward[0]
    return company  # type: ignore[return-value]


def sit_down(company: Company | None) -> Seat:
    """Say who else is there from now on, in this thread, until `leave`."""
    seat = Seat(company)
    _here.seats.append(seat)
    return seat


def leave(seat: Seat) -> None:
    """Let company go, in whatever order it came."""
    seat.company = "left"


@contextmanager
def among(company: Company | None) -> Iterator[None]:
    """Run a block in some company."""
    seat = sit_down(company)
    try:
        yield
    finally:
        leave(seat)


@contextmanager
def recomputing_with(company: Company) -> Iterator[None]:
    """Run backward passes in which activation checkpointing may run parts of the model anew, in some company."""
    _in_backward.append(company)
    try:
        with among(None):
            yield
    finally:
        _in_backward.remove(company)


def _rows_in_order(values: Sequence[Any], _beside: Sequence[Any], order: Order) -> Tensor:
    first = values[0]
    if not isinstance(first, Tensor) or first.ndim == 0:
        found = f"shape {tuple(first.shape)}" if isinstance(first, Tensor) else f"type {type(first).__name__}"
        raise MeetingError(
            f"wb.gather was given something of {found}, which has no rows.",
            hint="gather tensors with one entry a row, [rows, ...]; add up anything else with wb.sum_over_batch(x).",
        )
    for number, value in enumerate(values):
        if order.cut is not None and len(value) != len(order.cut[number]):
            raise _wrong_rows("wb.gather", len(value), len(order.cut[number]))
        if value.shape[1:] != first.shape[1:] or value.dtype != first.dtype:
            raise _misfit("wb.gather", number, value, first, "each row to the same shape (pool or pad it)")
    return values[0] if len(values) == 1 else order.sort(torch.cat(list(values)))


def _sum(values: Sequence[Any], _beside: Sequence[Any], _order: Order) -> Any:
    first = values[0]
    if isinstance(first, Real):
        return sum(values)
    if not isinstance(first, Tensor):
        raise MeetingError(
            f"wb.sum_over_batch was given a {type(first).__name__}, which cannot be added up.",
            hint="pass a tensor or a number; several of them one by one.",
        )
    for number, value in enumerate(values):
        if value.shape != first.shape or value.dtype != first.dtype:
            raise _misfit("wb.sum_over_batch", number, value, first, "x to a sum over the rows that are here")
    wide = torch.int64 if first.dtype == torch.bool else first.dtype
    if first.is_floating_point() and first.element_size() < 4:
        wide = torch.float32
    total = first.to(wide)
    for value in values[1:]:
        total = total + value.to(wide)
    return total if first.dtype == torch.bool else total.to(first.dtype)


def _wrong_rows(kind: str, entries: int, rows: int) -> MeetingError:
    return MeetingError(
        f"{kind} was given {entries} entries in a micro-batch of {rows} rows.",
        hint="gather one entry a row, [rows, ...]; several views of a row one by one, or as x.view(rows, views, ...), "
        "and what is summed over rows with wb.sum_over_batch(x).",
    )


def _misfit(kind: str, number: int, value: Tensor, first: Tensor, to_do: str) -> MeetingError:
    return MeetingError(
        f"{kind} was given {value.dtype} of shape {tuple(value.shape)} in micro-batch {number}, and {first.dtype} of "
        f"shape {tuple(first.shape)} in micro-batch 0.",
        hint=f"bring {to_do} before they meet, in the same dtype.",
    )


_WITHIN = tuple(os.path.join(os.path.dirname(file), "") for file in (__file__, torch.__file__))  # noqa: PTH118, PTH120


def _site() -> Site:
    """The line of the user's code that called, below all frames of the engine and of PyTorch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_WITHIN):
        frame = frame.f_back
    if frame is None:
        return Site("<unknown>", 0)
    return Site(frame.f_code.co_filename, frame.f_lineno)
