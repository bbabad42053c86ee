"""Who else is there, for the micro-batch that runs in this thread?

A meeting does not know how micro-batches are run: alone, in lockstep, in a second pass, or anew in a backward pass. It
asks the company of its thread.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple, Protocol

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
    return Call(call.kind, call.site, None, call.combine, None, None, call.of, call.with_graph)


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
    global _uncompiled
    if _uncompiled is None and "torch._dynamo" in sys.modules:
        _uncompiled = torch.compiler.disable(_meet)  # type: ignore[no-untyped-call]  # a compiled model breaks its graph here
    return (_uncompiled or _meet)(kind, value, combine, beside, once, of)


_uncompiled: Callable[..., Any] | None = None


def _meet(
    kind: str,
    value: Any,
    combine: Combine,
    beside: Any,
    once: Callable[[Any, Sequence[Any]], None] | None,
    of: object,
) -> Any:
    company = here()
    if company is None:
        return value
    return company.meet(Call(kind, _site(), value, combine, beside, once, of, torch.is_grad_enabled()))


class Company(Protocol):
    """Who else is there, for the micro-batch that runs in this thread.

    Attributes:
        ranks: How many processes have micro-batches that meet.
    """

    ranks: int

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
        heard: Whether another rank has said so, and all know.
    """

    def __init__(self, why: str, *, joined: bool = False, heard: bool = False) -> None:
        super().__init__(why)
        self.why = why
        self.joined = joined
        self.heard = heard


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


@dataclass(slots=True)
class Alone:
    """Nobody else: the rows that are here are all. It is noted where somebody would have met.

    It is also the company of what a backward pass computes anew, where nothing happens once more.
    """

    met: list[Call] = field(default_factory=list)
    ranks: int = 1

    def meet(self, call: Call) -> Any:
        self.met.append(call)
        result = call.combine([call.value], [call.beside], Order(None))
        if call.once is not None and not _is_recomputing():
            call.once(result, [call.beside])
        return result

    def own_rows(self) -> Indices | None:
        return None


@dataclass(slots=True)
class Scout:
    """The first of several micro-batches that run as if they were alone: it ends where they would have to meet."""

    ended: Again | None = None
    ranks: int = 1

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
    """A window whose micro-batches come one by one, so that only a single one is its whole batch.

    Args:
        ranks: How many processes make the window together; of several, none has the whole batch.
    """

    ranks: int = 1
    micro_batches: int = 0
    _met: Call | None = None

    def meet(self, call: Call) -> Any:
        if call.with_graph:  # else it is an evaluation inside an open window
            self._met = call
            self._require_one(1 if _is_recomputing() else 0)
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

    def recomputing(self) -> AbstractContextManager[None]:
        """Return what makes it the company of all that a backward pass computes anew, in whichever thread."""
        return nullcontext() if self._met is None else recomputing_with(self)

    def _require_one(self, counted: int = 0) -> None:
        if self._met is not None and self.ranks > 1:
            raise not_over_ranks(f"The micro-batches of this window would have to meet at {self._met}", self.ranks)
        if self._met is not None and self.micro_batches > counted:
            raise MeetingError(
                f"The micro-batches of this window would have to meet at {self._met}, and they come one by one: each "
                "is gone before the next one runs.",
                hint="hand the logical batch to accumulator.step(batch), or the loader to accumulator.updates(loader, "
                "micro_batches=n); a window of your own can meet only in a single micro-batch.",
            )


def not_over_ranks(found: str, ranks: int) -> MeetingError:
    """Return the error that micro-batches which meet are spread over ranks."""
    return MeetingError(
        f"{found}, and the others are on {ranks} ranks, where a window of one's own does not reach them.",
        hint="hand the logical batch to accumulator.step(batch), or the loader to accumulator.updates(loader, "
        "micro_batches=n): there the micro-batches of all ranks meet.",
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
    if company is None and _in_backward and _is_recomputing():
        return _in_backward[0]
    return company  # type: ignore[return-value]


def _is_recomputing() -> bool:
    """Return whether this thread is inside of a backward pass, as is what activation checkpointing runs anew."""
    return torch._C._current_graph_task_id() != -1


def sit_down(company: Company | None) -> Seat:
    """Say who else is there from now on, in this thread, until `leave`."""
    seat = Seat(company)
    _here.seats.append(seat)
    return seat


def leave(seat: Seat) -> None:
    """Let company go, in whatever order it came."""
    seat.company = "left"
    seats = _here.seats
    while seats and seats[-1].company == "left":
        seats.pop()


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


_ENGINE = Path(__file__).parents[1]
_WITHIN = tuple(os.path.join(folder, "") for folder in (_ENGINE, Path(torch.__file__).parent))  # noqa: PTH118


def _site() -> Site:
    """The line of the user's code that called, below all frames of the engine and of PyTorch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_WITHIN):
        frame = frame.f_back
    if frame is None:
        return Site("<unknown>", 0)
    return Site(frame.f_code.co_filename, frame.f_lineno)
