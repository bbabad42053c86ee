"""Whose gradients are in ``.grad``? Those of one window at a time: the others keep theirs aside."""

import threading
import weakref
from collections.abc import Sequence

from torch import Tensor, nn

from wholebatch.core.errors import WindowError


class Holding:
    """What one window has in ``.grad``.

    Several accumulators may have a window open at the same time, as the two players of a GAN do, and the backward
    pass of one reaches the parameters of the other. Only the window that runs has its gradients in ``.grad``; the
    others keep theirs aside, and what lands on their parameters meanwhile is dropped.

    Args:
        parameters: Whose gradients are the window's.
        bystanders: Whose ``.grad`` is left as it was found.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], bystanders: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._everything = [*parameters, *bystanders]
        self._found: list[Tensor | None] = []
        self._parked: list[Tensor | None] | None = None
        self._watched: Tensor | None = None
        self._grad: Tensor | None = None
        self._version = -1
        self._is_empty = False  # as far as is known: nothing has run since `begin`

    def begin(self) -> None:
        """Begin with nothing. Gradients that somebody left behind are set aside, never added."""
        self._take_over()
        self._found = self._take_out()
        self.lose_track()
        self._is_empty = True

    def hold(self) -> None:
        """Make this the window whose gradients are in ``.grad``.

        Raises:
            WindowError: Somebody zeroed, scaled or added to the gradients since `watch`.
        """
        by = _held.by
        if by is None or by() is not self:
            self._take_over()
            return
        if self._is_empty and any(each.grad is not None for each in self._parameters):
            raise _meddled("added to")
        if self._watched is None:
            return
        grad = self._watched.grad
        if grad is not self._grad or (grad is not None and grad._version != self._version):
            raise _meddled("set to None" if grad is None else "changed")

    def watch(self) -> None:
        """Note how far the gradients have come, at one parameter that has one, if any."""
        if self._watched is None:
            some = (each for each in self._parameters if each.grad is not None)
            self._watched = next(some, self._parameters[-1])
        self._is_empty = False
        grad = self._grad = self._watched.grad
        self._version = -1 if grad is None else grad._version

    def lose_track(self) -> None:
        """Take the gradients as they will stand at the next `watch`."""
        self._watched = self._grad = None
        self._is_empty = False

    def end(self, *, used_up: bool) -> None:
        """Leave ``.grad`` as it was found.

        Args:
            used_up: Whether it is empty instead where it was the window's.
        """
        self._take_over()
        own = len(self._parameters) if used_up else 0
        _put(self._everything, [*[None] * own, *self._found[own:]])
        self._found = []
        self.lose_track()
        _held.by = None

    @property
    def gradients(self) -> list[Tensor | None]:
        """What the window has come to at each of its parameters, wherever it is kept."""
        kept = self._parked if self._parked is not None else [each.grad for each in self._everything]
        return kept[: len(self._parameters)]

    @property
    def found(self) -> list[Tensor | None]:
        """What was there at each of the window's parameters before it."""
        return self._found[: len(self._parameters)]

    @found.setter
    def found(self, found: Sequence[Tensor | None]) -> None:
        self._found[: len(self._parameters)] = found

    def _take_over(self) -> None:
        before = _held.by() if _held.by is not None else None
        if before is not None and before is not self:
            before._parked = before._take_out()
        if self._parked is not None:
            _put(self._everything, self._parked)
            self._parked = None
        _held.by = weakref.ref(self)

    def _take_out(self) -> list[Tensor | None]:
        taken = [parameter.grad for parameter in self._everything]
        for parameter in self._everything:
            parameter.grad = None
        return taken


class _Held(threading.local):
    """Who holds ``.grad`` in this thread."""

    by: "weakref.ref[Holding] | None" = None


_held = _Held()


def _meddled(done: str) -> WindowError:
    return WindowError(
        f"Inside an open window the gradients were {done} by somebody else.",
        hint="the window owns the gradients until it closes: hand losses to window.backward(), and leave out "
        "loss.backward(), optimizer.zero_grad() and clipping between its micro-batches; it does all three "
        "(clip_norm=...). What trains another model through this one takes a window of its own.",
    )


def _put(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
