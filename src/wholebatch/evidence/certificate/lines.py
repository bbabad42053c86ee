"""What does each line of the user's step do to the gradients? Found by looking after each line, not by reading it."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from wholebatch.evidence.certificate.source import Place, is_users

Kind = Literal["added", "scaled", "clamped", "zeroed", "changed", "stepped", "scheduled"]


class PlannedFailureError(torch.OutOfMemoryError):
    """Out of memory, on purpose."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What a line did.

    Attributes:
        kind: A backward pass ``"added"``; gradients were ``"scaled"`` by one factor, ``"clamped"`` entry by entry,
            ``"zeroed"``, or ``"changed"`` in another way; the optimizer was ``"stepped"``, a schedule ``"scheduled"``.
        place: The line.
        passes: Backward passes until then.
    """

    kind: Kind
    place: Place
    passes: int


class LineWatch:
    """Looks at the gradients whenever the interpreter reaches another line of the user's source.

    A debugger or a measure of coverage that traces lines is set aside meanwhile, and put back.

    Args:
        parameters: Whose gradients are looked at.
        passes: Counts the backward passes until now.
    """

    def __init__(self, parameters: list[nn.Parameter], passes: Callable[[], int]) -> None:
        self._parameters = parameters
        self._passes = passes
        self._seen_passes = 0
        self._here: tuple[str, int] | None = None
        self._grads: list[Tensor | None] = [None] * len(parameters)
        self._marks: list[Any] = [None] * len(parameters)
        self._failing = False
        self.effects: list[Effect] = []
        self.handler: Place | None = None

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        sys.settrace(self._before)
        self._look()

    def note(self, kind: Kind) -> None:
        """Say that something happened on the line that runs now."""
        self._look()
        if self._here is not None:
            self.effects.append(Effect(kind, Place.at(*self._here), self._passes()))

    def _enter(self, frame: FrameType, _event: str, _argument: object) -> Callable[..., Any] | None:
        if not is_users(frame.f_code.co_filename):
            return None
        self._look()
        self._here = (frame.f_code.co_filename, frame.f_lineno)
        return self._line

    def _line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        self._look()
        file = frame.f_code.co_filename
        if event == "exception":
            self._failing = self._failing or _is_planned(argument[1])
        elif event == "line" and self._failing:
            self._failing = False
            self.handler = Place.at(file, frame.f_lineno)
        self._here = (file, frame.f_lineno)
        if event == "return":
            above = frame.f_back
            while above is not None and not is_users(above.f_code.co_filename):
                above = above.f_back
            if above is not None and above.f_trace is not None:
                self._here = (above.f_code.co_filename, above.f_lineno)
        return self._line

    def _look(self) -> None:
        """Compare the gradients with what they were on the last line."""
        marks = [_mark(parameter.grad) for parameter in self._parameters]
        changed = [place for place, mark in enumerate(marks) if mark != self._marks[place]]
        added, self._seen_passes = self._passes() > self._seen_passes, self._passes()
        if not changed and not added:
            return
        now = [_dense(parameter.grad) for parameter in self._parameters]
        if self._here is not None:
            pairs = [(self._grads[place], now[place]) for place in changed]
            kind = "added" if added else _kind(pairs)
            if kind is not None:
                self.effects.append(Effect(kind, Place.at(*self._here), self._passes()))
        self._grads, self._marks = now, marks


def _mark(grad: Tensor | None) -> Any:
    """What changes when a gradient does, whichever way it is written to."""
    if grad is None:
        return None
    if grad.layout != torch.strided:
        return id(grad), grad._version
    return id(grad), grad._version, float(grad.detach().abs().sum())


def _dense(grad: Tensor | None) -> Tensor | None:
    if grad is None:
        return None
    dense = grad.detach().to_dense() if grad.layout != torch.strided else grad.detach()
    real = torch.view_as_real(dense) if dense.is_complex() else dense
    return real.to(torch.float64, copy=True)


def _kind(pairs: list[tuple[Tensor | None, Tensor | None]]) -> Kind | None:
    """Say what turned some gradients into others; None where their values stayed the same."""
    known = [(old, new) for old, new in pairs if old is not None or new is not None]
    if not known:
        return None
    old = torch.cat([_or_zero(old, new).flatten() for old, new in known])
    new = torch.cat([_or_zero(new, old).flatten() for old, new in known])
    if torch.equal(old, new):
        return None
    if not bool(new.any()):
        return "zeroed"
    near = 2.0**-7 * new.abs()  # half of the bits of bfloat16
    factor = torch.dot(new, old) / torch.dot(old, old).clamp(min=torch.finfo(old.dtype).tiny)
    if bool(((new - factor * old).abs() <= near).all()):
        return "scaled"
    shrunk = (new - old).abs() > near
    smaller = bool((new * old >= 0).all()) and bool((new.abs() <= old.abs()).all())
    if smaller and bool((new[shrunk].abs() >= new.abs().max() * (1 - 2.0**-7)).all()):
        return "clamped"
    return "changed"


def _or_zero(tensor: Tensor | None, other: Tensor | None) -> Tensor:
    if tensor is not None:
        return tensor
    assert other is not None  # one of the two is there
    return torch.zeros_like(other)


def _is_planned(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, PlannedFailureError):
            return True
        error = error.__cause__ or error.__context__
    return False
