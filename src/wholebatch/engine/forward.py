"""How does a micro-batch go through the model? Moved to where it is, in the precision that was asked for."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from wholebatch.core.errors import LossError
from wholebatch.core.weights import Count
from wholebatch.engine.device import move
from wholebatch.engine.objective import Objective, Part
from wholebatch.engine.precision import Precision
from wholebatch.engine.setup import Setup
from wholebatch.engine.window import Window


class Forward:
    """The forward passes of an accumulator.

    Args:
        setup: The model and where it is.
        objective: What is to be trained.
        precision: In which forward passes run.
    """

    def __init__(self, setup: Setup, objective: Objective, precision: Precision) -> None:
        self.setup = setup
        self.objective = objective
        self.precision = precision
        self._accelerated = setup.device.type != "cpu"

    def into(self, window: Window, micro_batch: Any, rows: int | None, count: Count | None) -> None:
        """Run one micro-batch through the model and add its gradient to the window's.

        Args:
            window: Open.
            micro_batch: As the loss function takes it, or None where there is nothing to learn.
            rows: How many it has, if known. Unit: rows.
            count: Its targets; None: they are counted here. Unit: targets.
        """
        objective, setup = self.objective, self.setup
        if count is None or micro_batch is None:
            count = objective.count(micro_batch, rows)
        if not isinstance(count, Tensor) and count == 0:
            window.add(None, rows=rows)
            return
        if self._accelerated:
            micro_batch = move(micro_batch, setup.device)
        if not window.intake.row_by_row:
            window.intake.before_forward()
        if self.precision.as_is:
            part = objective(setup.model, micro_batch, count)
        else:
            with self.precision.autocast():
                part = objective(setup.model, micro_batch, count)
        del micro_batch
        window.add(part, rows=rows)

    def agree(self, window: Window, passes: int, candidates: Iterable[Any]) -> None:
        """Agree with other ranks on how many passes all make in a window, where that has to be the same.

        Args:
            window: Open and empty.
            passes: Of this rank.
            candidates: Small micro-batches for passes of weight zero; none where this rank has no rows.
        """
        group = self.setup.group
        if not group.in_step:
            return
        spare, learns = self._with_targets(candidates)
        if spare is not None:
            self._rehearse(window, spare)
        group.agree_on_passes(passes, spare, learns=learns)
        if group.passes:
            self._rehearse(window, group.spare)

    def _with_targets(self, candidates: Iterable[Any]) -> tuple[Any, bool]:
        """Return the first that has targets, since a mean over none is not a number, not even at weight zero."""
        first = None
        for each in candidates:
            count = self.objective.count(each, 1)
            if isinstance(count, Tensor) or count != 0:
                return each, True
            first = each if first is None else first
        return first, False

    def _rehearse(self, window: Window, spare: Any) -> None:
        """Make a pass that leaves no trace, for a group of ranks that has to know what one sends."""
        group = self.setup.group
        if group.rehearses:
            window.retraction.mark()
            with group.rehearsing():
                window.intake.rehearse(self._of_nothing(spare))
            window.retraction.take_back()

    def fill(self, window: Window) -> None:
        """Make passes of weight zero for as long as other ranks make more.

        Args:
            window: Open; all micro-batches of this rank are in it.
        """
        while window.intake.lacks_passes:
            window.intake.add_nothing(self._of_nothing(self.setup.group.spare))

    def _of_nothing(self, spare: Any) -> Part:
        part = self.meeting(lambda: spare, None, 1)
        if part is None:
            raise LossError(
                "The loss function returned None for a micro-batch that stands in where this rank has fewer than "
                "others.",
                hint='with communication="each" every pass has to make a loss.',
            )
        return part

    def meeting(
        self, take: Callable[[], Any], rows: int | None, count: Count | None, *, graph: bool = True
    ) -> Part | None:
        """Run one micro-batch of those that meet through the model, also where it holds no target.

        Args:
            take: Returns the micro-batch.
            rows: How many it has, if known. Unit: rows.
            count: Its targets; None: they are counted here. Unit: targets.
            graph: Whether its loss is to be differentiated.
        """
        micro_batch = take()
        if micro_batch is None:
            return None
        if count is None:
            count = self.objective.count(micro_batch, rows)
        graph = graph and (isinstance(count, Tensor) or count != 0)
        micro_batch = move(micro_batch, self.setup.device)
        with self.precision.autocast():
            return self.objective(self.setup.model, micro_batch, count, graph=graph)
