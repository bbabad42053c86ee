"""What did a meeting come to? Kept for activation checkpointing, which runs parts of a model twice."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from wholebatch.core.errors import MeetingError
from wholebatch.core.split import Indices
from wholebatch.engine.meetings.call import Call, checkpointed
from wholebatch.engine.meetings.draws import Passage, distance


@dataclass(frozen=True, slots=True)
class _Held:
    """A meeting: what was brought, what gives it again, where the random stream stood, and who may come anew."""

    calls: Sequence[Call]
    again: Callable[[Call], Any]
    passage: Passage
    by: Sequence[Call]


class Minutes:
    """The meetings of a window. In a backward pass it is the company of whatever is computed anew.

    Every micro-batch got the same from a meeting, so it only has to be found out which meeting it was: by the layer, by
    the line if the recomputation comes by it, and, where several are left, by the checkpointed part and how many of
    them it has come by; where that is not known, by what was brought.

    Args:
        ranks: How many processes have micro-batches that meet.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._held: dict[tuple[str, int], list[_Held]] = {}
        self._passed: dict[object, Counter[tuple[object, ...]]] = defaultdict(Counter)
        self._results: list[tuple[Call, Tensor, int]] = []

    def take(
        self,
        calls: Sequence[Call],
        result: Any,
        again: Callable[[Call], Any],
        passage: Passage,
        *,
        by: Sequence[Call] | None = None,
    ) -> None:
        """Note a meeting.

        Args:
            calls: What each micro-batch brought.
            result: What it came to.
            again: Returns what a micro-batch got, for what it brings when it is computed anew.
            passage: Where the random stream stood.
            by: Calls of those that may be computed anew, if they are not `calls`.
        """
        held = _Held(calls, again, passage, calls if by is None else by)
        self._held.setdefault((calls[0].kind, id(calls[0].of)), []).append(held)
        if isinstance(result, Tensor):
            self._results.append((calls[0], result, result._version))

    def require_unchanged(self) -> None:
        """Raise an error if somebody has changed in place what all micro-batches share.

        Raises:
            MeetingError: Somebody has.
        """
        for call, result, version in self._results:
            if result._version != version:
                raise changed_in_place(f"What {call} returned")

    def meet(self, call: Call) -> Any:
        meetings = self._held.get((call.kind, id(call.of)), [])
        if not meetings:
            raise MeetingError(
                f"A part of the model that is recomputed in the backward pass meets at {call}, where it did not in the "
                "forward pass.",
                hint="let a checkpointed function do the same both times.",
            )
        here = [each for each in meetings if each.calls[0].site == call.site] or meetings
        held = self._in_order(here) or min(here, key=lambda each: distance(each.calls, call))
        if call.with_graph and not held.calls[0].with_graph:
            raise MeetingError(
                f"Micro-batches cannot meet inside activation checkpointing with use_reentrant=True: {call}.",
                hint="pass use_reentrant=False to torch.utils.checkpoint.checkpoint.",
            )
        held.passage.resume(held.calls, call)
        return held.again(call)

    def _in_order(self, meetings: Sequence[_Held]) -> _Held | None:
        """Return the meeting whose turn it is in the checkpointed part that is computed anew, if that is known."""
        if len(meetings) == 1:
            return meetings[0]
        part, run = checkpointed()
        if part is None:
            return None
        inside = [held for held in meetings if any(each.part is not None and each.part() is part() for each in held.by)]
        line = meetings[0].calls[0].key
        place = self._passed[run][line]
        self._passed[run][line] += 1
        return inside[place] if place < len(inside) else None

    def own_rows(self) -> Indices | None:
        raise MeetingError(
            "wb.own_rows was called in a part of the model that is recomputed in the backward pass, where nobody knows "
            "which micro-batch it is.",
            hint="call it outside of the checkpointed function and pass the places in.",
        )


def changed_in_place(what: str) -> MeetingError:
    """Return the error that somebody has changed what all micro-batches share."""
    return MeetingError(
        f"{what} was changed in place, and every micro-batch reads it.",
        hint="change a copy of it: x.clone(), or an operation that returns a new tensor.",
    )
