"""How does one logical batch become an update? In one cut; made again when its micro-batches turn out to meet."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from wholebatch.core.batch import LogicalBatch
from wholebatch.core.errors import RankError
from wholebatch.core.record import Update
from wholebatch.core.split import Indices, side_by_side
from wholebatch.core.weights import Count
from wholebatch.engine import memory
from wholebatch.engine.batchnorm import require_row_by_row
from wholebatch.engine.checks.check import FirstCheck
from wholebatch.engine.collated import Collated
from wholebatch.engine.fit.cutting import Place, Shortage
from wholebatch.engine.forward import Forward
from wholebatch.engine.meetings.company import Again
from wholebatch.engine.meetings.lockstep import Lockstep
from wholebatch.engine.meetings.singly import Scout
from wholebatch.engine.opening import Windows
from wholebatch.engine.reasons import Say
from wholebatch.engine.versions import Versions
from wholebatch.engine.window import Window


class Making:
    """Makes one window from the micro-batches of one logical batch.

    Args:
        windows: Where the window is opened.
        forward: Runs the micro-batches.
        lockstep: Runs those that meet.
        first_check: Looks at the first batch that is cut.
        say: Takes the reason of an automatic choice.
    """

    def __init__(
        self, windows: Windows, forward: Forward, lockstep: Lockstep, first_check: FirstCheck, say: Say
    ) -> None:
        self._windows = windows
        self._forward = forward
        self._lockstep = lockstep
        self._first_check = first_check
        self._say = say
        self._collated = Collated()

    def attempt(self, rows: LogicalBatch, cut: Sequence[Indices], padding: float | None) -> Update | Shortage:
        """Return the update of a logical batch in one cut, or what is known of a shortage of memory that undid it."""
        place = Place()
        return self._attempted(lambda: self.make(rows, cut, padding, place), place)

    def attempt_of(self, micro_batches: Sequence[Any], rows: Sequence[int | None]) -> Update | Shortage:
        """Return the same of micro-batches that somebody else has cut, as for `make_of`."""
        place = Place()
        return self._attempted(lambda: self.make_of(micro_batches, rows, place), place)

    def make(self, rows: LogicalBatch, cut: Sequence[Indices], padding: float | None, place: Place) -> Update:
        """Make one update from a logical batch in one cut.

        Args:
            rows: The logical batch.
            cut: The rows of each micro-batch.
            padding: Share of padding, if known.
            place: Told which micro-batch runs.

        Raises:
            BatchNormError, VerifyError: The cut would change the gradient.
            Exception: What the loss function raised; nothing has changed then.
        """
        ranks = self._expect_meeting()
        if len(cut) > 1 or ranks > 1:
            self._require_row_by_row()
        if len(cut) > 1:
            self._first_check.look(rows, max(cut, key=len))
        # Rows of a list are collated once, when their turn comes, so that the padded logical batch never exists.
        objective = self._forward.objective
        counts: list[Count | None] = [None] * len(cut)
        if objective.targets is None:
            counts = [len(part) for part in cut]
        elif not rows.collates or rows.kept is not None:
            counts = [objective.count(rows.take(part), len(part)) for part in cut]
        takes: list[Callable[[], Any]] = [partial(rows.take, part) for part in cut]
        if len(cut) > 1 and not rows.collates:
            takes = list(map(Versions(rows.given).guarded, takes))
        if rows.collates and objective.targets is None and (len(cut) > 1 or ranks > 1):
            takes = [partial(self._collated.take, take, len(part)) for take, part in zip(takes, cut, strict=True)]
        spares = (rows.take([row]) for part in cut for row in part)
        return self._made(takes, list(map(len, cut)), counts, cut, spares, place, padding=padding)

    def make_of(self, micro_batches: Sequence[Any], rows: Sequence[int | None], place: Place) -> Update:
        """Make one update from micro-batches that somebody else has cut, all of which are there.

        Args:
            micro_batches: As the loss function takes them.
            rows: Of each, if known. Unit: rows.
            place: Told which micro-batch runs.
        """
        if self._expect_meeting() > 1 or len(micro_batches) > 1:
            self._require_row_by_row()
        takes: list[Callable[[], Any]] = [partial(_itself, each) for each in micro_batches]
        if len(micro_batches) > 1:
            takes = [Versions(each).guarded(take) for each, take in zip(micro_batches, takes, strict=True)]
        counts = list(map(self._forward.objective.count, micro_batches, rows))
        return self._made(takes, rows, counts, side_by_side(rows), micro_batches, place)

    def _made(
        self,
        takes: Sequence[Callable[[], Any]],
        rows: Sequence[int | None],
        counts: Sequence[Count | None],
        cut: Sequence[Indices] | None,
        spares: Iterable[Any],
        place: Place,
        padding: float | None = None,
    ) -> Update:
        """Make one update from micro-batches, one after the other, or together as soon as it is known that they meet.

        Args:
            takes: Return each micro-batch.
            rows: Of each, if known. Unit: rows.
            counts: The targets of each, if known. Unit: targets.
            cut: Where their rows stand in the logical batch, if known.
            spares: As for `Forward.agree`.
            place: Told which micro-batch runs.
            padding: Share of padding, if known.
        """
        known = [count for count in counts if count is not None]
        total = sum(known) if len(known) == len(counts) else None
        opened = {"targets": total, "micro_batches": len(takes), "padding": padding}
        several = len(takes) > 1 or self._windows.rules.setup.group.ranks > 1
        update = None
        if not self._lockstep.meets or not several:

            def pass_each(window: Window) -> None:
                self._forward.agree(window, len(takes), spares)
                for number, (take, own, count) in enumerate(zip(takes, rows, counts, strict=True), 1):
                    place.rows = own
                    if number == len(takes):
                        window.expect_last()
                    self._forward.into(window, take(), own, count)
                place.rows = None
                self._forward.fill(window)

            update = self._fill(pass_each, Scout() if several else None, **opened)
        while update is None:  # they meet
            update = self._meet(takes, rows, counts, cut, place, **opened)
        return update

    def _fill(self, fill: Callable[[Window], None], company: Scout | None, **opened: Any) -> Update | None:
        """Return the update of a window that is filled, or None where it has to be made again, knowing more."""
        window = self._windows.open(row_by_row=True, company=company, **opened)
        self._collated.begin()
        try:
            fill(window)
            if not self._forward.objective.counts:
                self._collated.require_all()
            if company is not None:
                company.require_alone()
            return window.close()
        except Again as again:
            self._windows.take_back(window)
            self._lockstep.learn(again)
            if not again.joined and not again.heard:
                self._windows.rules.setup.group.report_meeting(again.why)
        except BaseException:
            if window.is_open:
                window.rollback()
            raise
        return None

    def _meet(
        self,
        takes: Sequence[Callable[[], Any]],
        rows: Sequence[int | None],
        counts: Sequence[Count | None],
        cut: Sequence[Indices] | None,
        place: Place,
        **opened: Any,
    ) -> Update | None:
        """Return the update of micro-batches that meet, or None where it has to be made again, knowing more."""
        runs = [partial(self._forward.meeting, *each) for each in zip(takes, rows, counts, strict=True)]

        def meet(window: Window) -> None:
            transaction = self._windows.rules.transaction
            self._lockstep.run(window, transaction, runs, rows, cut, place, self._say)

        return self._fill(meet, None, **opened)

    def _attempted(self, make: Callable[[], Update], place: Place) -> Update | Shortage:
        try:
            return make()
        except RankError as error:
            elsewhere = self._windows.rules.setup.group.take_shortages()
            if not elsewhere:
                raise
            return Shortage(error.found, None, elsewhere)
        except Exception as error:
            return Shortage(memory.said_of_shortage(error), place.rows)

    def _expect_meeting(self) -> int:
        """Say that the next window is that of a model as it is known, and return how many ranks make it."""
        group = self._windows.rules.setup.group
        group.expect_meeting(self._lockstep.meets)
        return group.ranks

    def _require_row_by_row(self) -> None:
        rules = self._windows.rules
        if rules.batch_norm == "refuse":
            require_row_by_row(rules.setup.model)


def _itself(micro_batch: Any) -> Any:
    return micro_batch
