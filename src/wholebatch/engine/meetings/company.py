"""Who else is there, for the micro-batch that runs in this thread?

A meeting does not know how micro-batches are run: alone, in lockstep, in a second pass, or anew in a backward pass. It
asks the company of its thread.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch

from wholebatch.core.split import Indices
from wholebatch.engine.meetings.call import Call, Combine, checkpointed, site


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
    part, _ = checkpointed()
    return company.meet(Call(kind, site(), value, combine, beside, once, of, torch.is_grad_enabled(), part))


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


class Seat:
    """Some company, from when it comes until it leaves."""

    __slots__ = ("company",)

    def __init__(self, company: Company | None) -> None:
        self.company: Company | Literal["left"] | None = company


class _Here(threading.local):
    def __init__(self) -> None:
        self.seats: list[Seat] = []
        self.in_backward: list[Company] = []


_here = _Here()
_in_backward: list[Company] = []
"""Whom a recomputation meets that a backward pass starts, in a thread of a device; one for each thread that trains."""


def here() -> Company | None:
    """Return who else is there for the micro-batch that runs in this thread, or None outside of any."""
    seats = _here.seats
    while seats and seats[-1].company == "left":
        seats.pop()
    company = seats[-1].company if seats else None
    if company is None and _in_backward and is_recomputing():
        return (_here.in_backward or _in_backward)[-1]
    return company  # type: ignore[return-value]


def is_recomputing() -> bool:
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
    _here.in_backward.append(company)
    try:
        with among(None):
            yield
    finally:
        _here.in_backward.remove(company)
        _in_backward.remove(company)
