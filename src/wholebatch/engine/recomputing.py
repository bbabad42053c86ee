"""What did a meeting come to? Kept for activation checkpointing, which runs parts of a model twice."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wholebatch.core.errors import MeetingError
from wholebatch.core.split import Indices
from wholebatch.engine.meeting import Call


class Minutes:
    """The meetings of a window. In a backward pass it is the company of whatever is computed anew.

    Every micro-batch got the same from a meeting, so it only has to be found out which meeting it was: by its place,
    and, where several were there, by what was brought.
    """

    def __init__(self) -> None:
        self._by_key: dict[tuple[object, ...], list[tuple[Sequence[Call], Callable[[Call], Any]]]] = {}
        self._results: list[tuple[Call, Tensor, int]] = []

    def take(self, calls: Sequence[Call], result: Any, again: Callable[[Call], Any]) -> None:
        """Note a meeting.

        Args:
            calls: What each micro-batch brought.
            result: What it came to.
            again: Returns what a micro-batch got, for what it brings when it is computed anew.
        """
        self._by_key.setdefault(calls[0].key, []).append((calls, again))
        if isinstance(result, Tensor):
            self._results.append((calls[0], result, result._version))

    def require_unchanged(self) -> None:
        """Raise an error if somebody has changed in place what all micro-batches share.

        Raises:
            MeetingError: Somebody has.
        """
        for call, result, version in self._results:
            if result._version != version:
                raise MeetingError(
                    f"What {call} returned was changed in place, and every micro-batch reads it.",
                    hint="change a copy of it: x.clone(), or an operation that returns a new tensor.",
                )

    def meet(self, call: Call) -> Any:
        meetings = self._by_key.get(call.key, [])
        same = meetings if len(meetings) == 1 else [each for each in meetings if _brought(each[0], call)]
        if not same:
            raise MeetingError(
                f"A part of the model that is recomputed in the backward pass meets at {call}, where it did not in the "
                "forward pass.",
                hint="let a checkpointed function do the same both times.",
            )
        calls, again = same[0]
        if call.with_graph and not calls[0].with_graph:
            raise MeetingError(
                f"Micro-batches cannot meet inside activation checkpointing with use_reentrant=True: {call}.",
                hint="pass use_reentrant=False to torch.utils.checkpoint.checkpoint.",
            )
        return again(call)

    def own_rows(self) -> Indices | None:
        raise MeetingError(
            "wb.own_rows was called in a part of the model that is recomputed in the backward pass, where nobody knows "
            "which micro-batch it is.",
            hint="call it outside of the checkpointed function and pass the places in.",
        )


def _brought(calls: Sequence[Call], call: Call) -> bool:
    if not isinstance(call.value, Tensor):
        return any(each.value == call.value for each in calls)
    return any(each.value.shape == call.value.shape and torch.equal(each.value, call.value) for each in calls)
