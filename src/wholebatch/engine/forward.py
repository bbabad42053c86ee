"""How does a micro-batch go through the model? Moved to where it is, in the precision that was asked for."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from wholebatch.core.errors import RankError
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
            micro_batch: As the loss function takes it.
            rows: How many it has, if known. Unit: rows.
            count: Its targets; None: they are counted here. Unit: targets.
        """
        objective, setup = self.objective, self.setup
        if count is None:
            count = objective.count(micro_batch, rows)
        if not isinstance(count, Tensor) and count == 0:
            window.leave_out(rows=rows)
            return
        if self._accelerated:
            micro_batch = move(micro_batch, setup.device)
        if not window.row_by_row:
            window.before_forward()
        if self.precision.as_is:
            part = objective(setup.model, micro_batch, count)
        else:
            with self.precision.autocast():
                part = objective(setup.model, micro_batch, count)
        del micro_batch
        if part is None:
            window.leave_out(rows=rows)
        else:
            window.add(part, rows=rows)

    def fill(self, window: Window) -> None:
        """Make passes of weight zero for as long as other ranks make more.

        Args:
            window: Open; all micro-batches of this rank are in it.
        """
        while window.lacks_passes:
            spare = self.setup.group.spare
            part = self.meeting(lambda spare=spare: spare, None, 1)  # type: ignore[misc]
            if part is None:
                raise RankError(
                    "The loss function returned None for a micro-batch that stands in where this rank has fewer than "
                    "others.",
                    hint='with communication="each" every pass has to make a loss.',
                )
            window.add_nothing(part)

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
        if count is None:
            count = self.objective.count(micro_batch, rows)
        graph = graph and (isinstance(count, Tensor) or count != 0)
        micro_batch = move(micro_batch, self.setup.device)
        with self.precision.autocast():
            return self.objective(self.setup.model, micro_batch, count, graph=graph)
