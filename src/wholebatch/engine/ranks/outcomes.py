"""Why has a window come to nothing, on which ranks? They tell each other once all of them are out of it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from wholebatch.core.split import Size
from wholebatch.core.window import WindowState
from wholebatch.engine.meetings.company import Again
from wholebatch.engine.ranks.message import spoilt, told, words
from wholebatch.engine.ranks.wire import Wire
from wholebatch.engine.weighing import Reading, Weighing, widen


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one rank's part of a logical batch.

    Attributes:
        kind: Of what kind it is.
        said: In a few words.
        finer: To which size memory makes this rank go, if it ran out.
    """

    kind: Literal["done", "short", "meets", "failed"] = "done"
    said: str = ""
    finer: Size | None = None


class Outcomes:
    """What ranks have told each other.

    Args:
        wire: Speaks to the others.

    Attributes:
        meet: Whether a rank has found out that micro-batches meet.
    """

    def __init__(self, wire: Wire) -> None:
        self.meet = False
        self._wire = wire
        self._shortages: list[Size] = []

    def exchange(self, outcome: Outcome) -> list[Outcome]:
        """Tell this rank's, and return those of all; whoever knows that micro-batches meet lets all know."""
        outcomes: list[Outcome] = self._wire.gather(outcome)
        self.meet = self.meet or any(each.kind == "meets" for each in outcomes)
        return outcomes

    def hear_why(self, weighing: Weighing, state: WindowState) -> Reading:
        """Raise what keeps the ranks from moving; on a rank whose own targets do, return them.

        Raises:
            RankError: A rank failed.
            Again: Nothing is wrong but that micro-batches meet.
        """
        targets, least = float(widen(state.targets)), float(weighing.least)
        wrong = bool(spoilt(weighing, state))
        said = f"its targets add up to {targets}, and a micro-batch holds {least}"
        outcomes = self.exchange(Outcome("failed", said) if wrong else Outcome())
        if wrong:
            return Reading(math.nan, math.nan, 0.0, math.nan, targets, least)
        meets = next((each.said for each in outcomes if each.kind == "meets"), None)
        self.judge(outcomes, always=meets is None)
        assert meets is not None
        raise Again(meets, heard=True)

    @contextmanager
    def moving(self) -> Iterator[None]:
        """The context in which all ranks have agreed to move: a rank that fails here cannot go on with the others."""
        try:
            yield
        except BaseException as error:
            self._wire.lost = f"it failed when all had agreed on an update ({words(error)})."
            raise

    def judge(self, outcomes: Sequence[Outcome], *, always: bool = False) -> None:
        """Raise if a rank failed; keep the shortages of memory, if there is nothing else.

        Args:
            outcomes: By rank.
            always: Raise for shortages too.

        Raises:
            RankError: What went wrong, by rank.
        """
        failed = [(rank, each.said) for rank, each in enumerate(outcomes) if each.kind == "failed"]
        short = [(rank, each.said) for rank, each in enumerate(outcomes) if each.kind == "short"]
        self._shortages = [] if failed else [each.finer for each in outcomes if each.finer is not None]
        if failed or always:
            raise told(failed or short)

    def take_shortages(self) -> list[Size]:
        """Return to which sizes ranks have to go, and keep nothing of it."""
        shortages, self._shortages = self._shortages, []
        return shortages
