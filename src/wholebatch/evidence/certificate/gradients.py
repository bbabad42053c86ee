"""Which gradient does the accumulator step with, and which one does the plain loop have of the undivided batch?"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from wholebatch.core.batch import LogicalBatch
from wholebatch.core.errors import NonFiniteError, WeightError
from wholebatch.core.record import Update
from wholebatch.engine import memory
from wholebatch.engine.accumulator import Accumulator
from wholebatch.engine.batchnorm import batch_dependent_layers
from wholebatch.engine.checks.flat import take_gradients
from wholebatch.engine.device import input_device, move
from wholebatch.engine.objective import Objective
from wholebatch.evidence import reference
from wholebatch.evidence.certificate.cuts import Cut


class Accumulated:
    """Runs the accumulator, and catches the gradients before its optimizer has them, so that nothing moves.

    Args:
        model: The module.
        parameters: Those that learn.
        objective: What is to be trained.
        roll_back: Puts back what a window has changed in the model.
        cut: How the accumulator cuts by itself.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        objective: Objective,
        roll_back: Callable[[], None],
        **cut: Any,
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._objective = objective
        self._roll_back = roll_back
        self._caught: list[Tensor] = []
        self._accumulator = Accumulator(
            model,
            SGD(self._parameters, lr=0.0),
            objective.loss_fn,
            targets=objective.targets,
            reduction=objective.reduction,
            batch_norm="per_micro_batch",
            check=None,
            on_nonfinite="raise",
            before_step=self._catch,
            **cut,
        )

    def step(self, batch: Any) -> tuple[Update | None, list[Tensor]]:
        """Return the record and the gradient of `Accumulator.step`; where it is not finite, none and NaN.

        Raises:
            WeightError: The batch holds no target.
        """
        try:
            update = self._accumulator.step(batch)
        except NonFiniteError:  # of the cut; whether the batch is, is seen when it runs as a whole
            self._caught = [torch.full((each.numel(),), math.nan) for each in self._parameters]
            update = None
        self._roll_back()
        if update is not None and update.skipped is not None:
            raise nothing(update.skipped)
        return update, self._caught

    def window(self, rows: LogicalBatch, cut: Cut) -> list[Tensor]:
        """Return the gradient of another cut, after `step`; of numbers that are none where a layer refuses it."""
        try:
            if self._accumulator.meets:
                self._accumulator.make(rows, cut.parts)
            else:
                self._run(rows, cut)
        except Exception as error:
            # By rows it was finite, and no layer refused; then this is a difference.
            if not isinstance(error, NonFiniteError) and not batch_dependent_layers(self._model):
                raise
            self._caught = [each * float("nan") for each in self._caught]
        self._roll_back()
        return self._caught

    def _catch(self) -> None:
        self._caught = take_gradients(self._parameters)

    def _run(self, rows: LogicalBatch, cut: Cut) -> None:
        device = input_device(self._model)
        with self._accumulator.window(micro_batches=len(cut.parts)) as window:
            for part in cut.parts:
                micro_batch = move(rows.take(part), device)
                count = self._objective.count(micro_batch, len(part))
                added = None
                if isinstance(count, Tensor) or count != 0:
                    added = self._objective(self._model, micro_batch, count)
                window.add(added, rows=len(part))


def undivided(model: nn.Module, objective: Objective, rows: LogicalBatch) -> tuple[int | None, Tensor]:
    """Leave the gradient of a batch as a whole in ``.grad``, and return the peak memory of that and the loss."""
    device = input_device(model)
    memory.reset_peak(device)
    loss: Tensor = reference.gradient(  # type: ignore[no-untyped-call]
        model,
        objective.loss_fn,
        move(rows.take(range(rows.rows)), device),
        targets=objective.targets or (lambda _batch: rows.rows),
        reduction=objective.reduction,
    )
    return memory.peak_bytes(device), loss


def require_finite(loss: Tensor, gradients: Sequence[Tensor]) -> None:
    """Refuse a batch from which nothing can be told.

    Raises:
        NonFiniteError: Its loss or its gradient is infinite or not a number, as a whole already.
    """
    if all(bool(each.isfinite().all()) for each in (loss, *gradients)):
        return
    what = f"loss is {loss.item()}" if not bool(loss.isfinite()) else "gradient is infinite or not a number"
    raise NonFiniteError(
        f"The batch is not finite as a whole: its {what}.",
        hint="look at its rows, and at divisions, logarithms and square roots in the loss.",
    )


def nothing(why: str = "no micro-batch held a target") -> WeightError:
    """Return the error that there is nothing to verify."""
    return WeightError(f"There is nothing to compare: {why}.", hint="verify with a batch that holds targets.")
