"""Where did the random stream stand at a meeting? Micro-batches share it, and take turns there."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wholebatch.core.errors import MeetingError
from wholebatch.engine.meetings.call import Call


class Stream:
    """The random streams of PyTorch, of which nobody draws between the stop of a micro-batch and the next one's turn.

    Args:
        device: Where the model is.

    Attributes:
        last: Where they stood when a micro-batch last stopped.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.last = self.now()

    def now(self) -> tuple[Tensor, ...]:
        """Return where they stand."""
        state: tuple[Tensor, ...] = (torch.get_rng_state(),)
        if self._device.type in ("cuda", "xpu"):
            state = (*state, torch.get_device_module(self._device).get_rng_state(self._device))
        return state

    def stop(self) -> None:
        """Note that a micro-batch has stopped; what has not moved is kept once."""
        now = self.now()
        if not _same(self.last, now):
            self.last = now

    def put(self, state: tuple[Tensor, ...]) -> None:
        """Let them stand somewhere else."""
        cpu, *other = state
        torch.set_rng_state(cpu)
        if other:
            torch.get_device_module(self._device).set_rng_state(other[0], self._device)


class Passage:
    """Where the streams stood when each micro-batch came to a meeting, and when it went on from there.

    Activation checkpointing puts the stream back to where it stood when a part of a model began. If the part meets,
    the others have drawn meanwhile: from the meeting on it has to be put to where it stood after it.

    Args:
        stream: Of the micro-batches.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._came: list[tuple[Tensor, ...]] = []
        self._went: list[tuple[Tensor, ...]] = []

    def come(self) -> None:
        """Note that the next micro-batch has come."""
        self._stream.stop()
        self._came.append(self._stream.last)

    def go_on(self) -> None:
        """Note that the next micro-batch goes on."""
        self._went.append(self._stream.last)

    def of(self, number: int) -> "Passage":
        """Return the same of one micro-batch alone."""
        one = Passage(self._stream)
        one._came, one._went = [self._came[number]], [self._went[number]]
        return one

    def resume(self, calls: Sequence[Call], call: Call) -> None:
        """Put the stream to where it stood when this micro-batch went on.

        Args:
            calls: What the micro-batches brought, in order; not looked at where there is one.
            call: What is brought now.

        Raises:
            MeetingError: Several came alike and went on with different draws.
        """
        now = self._stream.now()
        alike = [number for number, came in enumerate(self._came) if _same(came, now)]
        if not alike:  # the stream was not put back, so nothing that draws was checkpointed
            return
        if any(not _same(self._went[number], self._went[alike[0]]) for number in alike):
            distances = [distance(calls[number : number + 1], call) for number in alike]
            nearest = [number for number, far in zip(alike, distances, strict=True) if far == min(distances)]
            if any(not _same(self._went[number], self._went[nearest[0]]) for number in nearest):
                raise MeetingError(
                    f"A part of the model that is recomputed meets at {call} and draws random numbers after it, and "
                    f"{len(nearest)} micro-batches came there alike, so that nobody knows which one it is.",
                    hint="let the checkpointed function end at the meeting, or begin with it.",
                )
            alike = nearest
        self._stream.put(self._went[alike[0]])


def distance(calls: Sequence[Call], call: Call) -> float:
    """How far what was brought to a meeting is from what is brought now: 0 where computing it anew gives the same."""
    if not isinstance(call.value, Tensor):
        numbers = [each.value for each in calls if not isinstance(each.value, Tensor)]
        return 0.0 if call.value in numbers else math.inf
    same = [each.value for each in calls if isinstance(each.value, Tensor) and each.value.shape == call.value.shape]
    with torch.no_grad():
        return min((float((each.double() - call.value.double()).abs().sum()) for each in same), default=math.inf)


def _same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return one is other or all(map(torch.equal, one, other))
