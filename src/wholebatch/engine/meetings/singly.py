"""What happens where a micro-batch that runs by itself comes to a meeting?

It is alone, or it is the first of several and ends there, to be made again with the others, or that is an error.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from wholebatch.core.errors import MeetingError
from wholebatch.core.split import Indices
from wholebatch.engine.meetings.call import Call, Order, without_value
from wholebatch.engine.meetings.company import Again, is_recomputing, recomputing_with
from wholebatch.engine.meetings.moving import Moving


@dataclass(slots=True, eq=False)
class Alone:
    """Nobody else: the rows that are here are all. It is noted where somebody would have met.

    It is also the company of what a backward pass computes anew, where nothing happens once more.

    Args:
        moving: Takes what a meeting does once; None: it is done.
    """

    met: list[Call] = field(default_factory=list)
    ranks: int = 1
    moving: Moving | None = None

    def meet(self, call: Call) -> Any:
        self.met.append(call)
        result = call.combine([call.value], [call.beside], Order(None))
        if self.moving is not None and not is_recomputing():
            self.moving.once(call, result, [call.beside])
        elif call.once is not None and not is_recomputing():
            call.once(result, [call.beside])
        return result

    def own_rows(self) -> Indices | None:
        return None


@dataclass(slots=True, eq=False)
class Scout:
    """The first of several micro-batches that run as if they were alone: it ends where they would have to meet."""

    ranks: int = 1
    _why: str | None = None  # not the exception, which would hold the forward pass that it ended

    def meet(self, call: Call) -> Any:
        self._why = f"The micro-batches meet at {call}"
        raise Again(self._why)

    def own_rows(self) -> Indices | None:
        self._why = "The micro-batches ask for the places of their rows"
        raise Again(self._why)

    def require_alone(self) -> None:
        """End the micro-batch once more, if the user's code has caught what ended it."""
        if self._why is not None:
            raise Again(self._why)


@dataclass(slots=True, eq=False)
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
            self._met = without_value(call)  # or it would keep the forward pass
            self._require_one(1 if is_recomputing() else 0)
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
            raise MeetingError(
                f"The micro-batches of this window would have to meet at {self._met}, and the others are on "
                f"{self.ranks} ranks, where a window of one's own does not reach them.",
                hint="hand the logical batch to accumulator.step(batch), or the loader to accumulator.updates(loader, "
                "micro_batches=n): there the micro-batches of all ranks meet.",
            )
        if self._met is not None and self.micro_batches > counted:
            raise MeetingError(
                f"The micro-batches of this window would have to meet at {self._met}, and they come one by one: each "
                "is gone before the next one runs.",
                hint="hand the logical batch to accumulator.step(batch), or the loader to accumulator.updates(loader, "
                "micro_batches=n); a window of your own can meet only in a single micro-batch.",
            )
