"""One window on tensors: losses come in, and it becomes one update or leaves no trace."""

import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from wholebatch.core.errors import LossError, NonFiniteError, WeightError, WindowError
from wholebatch.core.record import Update
from wholebatch.core.weights import Count, Reduction, gradient_factor, loss_factor
from wholebatch.core.window import Phase, WindowState
from wholebatch.engine import memory
from wholebatch.engine.batchnorm import require_row_by_row
from wholebatch.engine.objective import Part, part_of
from wholebatch.engine.precision import Precision
from wholebatch.engine.setup import OnNonFinite, Setup
from wholebatch.engine.sums import GradientSum
from wholebatch.engine.transaction import Transaction, uninterrupted

BatchNorm: TypeAlias = Literal["refuse", "per_micro_batch"]
"""What batch-dependent layers do to a window of more than one micro-batch."""


class Window:
    """The micro-batches of one logical batch, from the first backward pass to the update.

    Made by `Accumulator.window`. It may also be used in a ``with`` statement, which closes it at the end of the
    block, or rolls it back if an exception leaves the block.

    Example:
        >>> import wholebatch as wb
        >>> model = torch.nn.Linear(2, 1)
        >>> accumulator = wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> with accumulator.window() as window:
        ...     for rows in (3, 1):
        ...         window.backward(model(torch.ones(rows, 2)).mean(), targets=rows)
        >>> window.update.targets, window.update.micro_batches
        (4, 2)
    """

    def __init__(
        self,
        *,
        number: int,
        setup: Setup,
        sums: GradientSum,
        transaction: Transaction,
        precision: Precision,
        reduction: Reduction,
        clip_norm: float | None,
        on_nonfinite: OnNonFinite,
        batch_norm: BatchNorm,
        targets: Count | None = None,
        micro_batches: int = 1,
        padding: float | None = None,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self._started = time.perf_counter()
        self._number = number
        self._setup = setup
        self._sums = sums
        self._transaction = transaction
        self._precision = precision
        self._reduction = reduction
        self._clip_norm = clip_norm
        self._on_nonfinite = on_nonfinite
        self._refuses = batch_norm == "refuse"
        self._total = targets
        self._expected = micro_batches
        self._padding = padding
        self._ended = ended
        self._state = WindowState()
        self._reference: Count | None = None
        self._least: Tensor | None = None
        self._scale: Tensor | None = None
        self._update: Update | None = None
        wide = torch.float32 if setup.device.type == "mps" else torch.float64
        self._loss_sum = torch.zeros((), dtype=wide, device=setup.device)
        memory.reset_peak(setup.device)
        transaction.begin()
        sums.start()

    @property
    def is_open(self) -> bool:
        """Whether the window still takes losses."""
        return self._state.phase is Phase.OPEN

    @property
    def update(self) -> Update:
        """The record of the window.

        Raises:
            WindowError: The window is still open, or was rolled back.
        """
        if self._update is None:
            raise WindowError(
                f"There is no record of a window that is {self._state.phase.value}.",
                hint="close the window first: update = window.close().",
            )
        return self._update

    def backward(self, loss: Any, targets: Count | None = None, *, rows: int | None = None) -> None:
        """Run the backward pass of one micro-batch and add its gradient to the window's.

        Args:
            loss: The mean over its targets, or their sum, as the accumulator's `reduction` says; or ``(loss_sum,
                targets)`` or ``(loss_sum, targets, once)``. Shape ``[]``.
            targets: What the loss averages over: a number, or a tensor that stays on its device. Unit: targets.
            rows: The micro-batch's rows, for the record. Unit: rows.

        Raises:
            WindowError: The window has ended, or somebody else changed the gradients in the meantime.
            LossError: The loss is not a scalar tensor with a graph. The window stays open.
            WeightError: The targets are missing, negative or not a number. The window stays open.
            BatchNormError: This is the second micro-batch and the model computes over the rows of a part.
        """
        self._state.require_open("take a loss")
        self.add(part_of(loss, targets=targets, reduction=self._reduction), rows=rows)

    def close(self) -> Update:
        """Turn the window into one update: divide, clip, step the optimizers and the schedules.

        Returns:
            The record of the update, or of why there was none.

        Raises:
            WindowError: The window has ended before, or somebody else changed the gradients in the meantime.
            NonFiniteError: The loss or the gradient is not finite, and ``on_nonfinite="raise"``.
            LossError: No parameter that an optimizer steps received a gradient.
            WeightError: Targets that were counted on the device turn out to be negative or not a number.
        """
        self._state.require_open("close")
        try:
            self._update = self._close()
        except BaseException:
            if self.is_open:
                self.rollback()
            raise
        return self._update

    def rollback(self) -> None:
        """End the window as if nothing had happened: gradients, buffers and random state are what they were.

        Raises:
            WindowError: The window has ended before.
        """
        self._state.require_open("roll back")
        self._transaction.roll_back()
        self._sums.roll_back()
        self._end(Phase.ROLLED_BACK)

    def __enter__(self) -> "Window":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.is_open:
            if kind is None:
                self.close()
            else:
                self.rollback()

    def before_forward(self) -> None:
        """Refuse a second forward pass that a batch-dependent layer would spoil.

        Raises:
            BatchNormError: The window is cut, and the model computes over the rows of a part.
        """
        if self._refuses and self._state.micro_batches > 0:
            require_row_by_row(self._setup.model)
            self._refuses = False

    def leave_out(self, *, rows: int | None) -> None:
        """Count a micro-batch from which there is nothing to learn.

        Args:
            rows: Its rows, if known. Unit: rows.
        """
        self._state.leave_out(rows=rows)

    def add(self, part: Part, *, rows: int | None) -> None:
        """Run the backward pass of a micro-batch's part of the objective.

        Args:
            part: Loss and targets.
            rows: The micro-batch's rows, if known. Unit: rows.
        """
        if not isinstance(part.targets, Tensor) and part.targets == 0:
            self._state.leave_out(rows=rows)
            return
        try:
            self.before_forward()
            losses, weights = self._weigh(part)
            self._sums.open_backward()
            torch.autograd.backward(losses, weights)
            self._sums.close_backward()
        except BaseException:
            self.rollback()
            raise
        self._state.add(rows=rows, targets=part.targets)

    def _weigh(self, part: Part) -> tuple[list[Tensor], list[Tensor]]:
        """Return the micro-batch's losses and the factors with which their gradients enter; add the losses up."""
        count = part.targets
        if self._reference is None:
            early = self._total is not None and not part.counted
            self._reference = self._total if early else _positive(count) * self._expected
            self._scale = self._precision.scale()
        weight = loss_factor(part.reduction, count, self._reference)
        losses, weights = [part.loss], [self._root(weight, count, part.loss)]
        self._note(part.loss, count if part.reduction == "mean" else 1)
        if part.once is not None:
            self._note(part.once, count)
            if part.once.requires_grad:
                losses.append(part.once)
                weights.append(self._root(loss_factor("mean", count, self._reference), count, part.once))
        if isinstance(count, Tensor):
            self._least = count if self._least is None else torch.minimum(self._least, count)
        return losses, weights

    def _root(self, weight: Count, count: Count, loss: Tensor) -> Tensor:
        """The gradient that enters at a loss: its weight times the loss scale; 0 where a device counted no target."""
        if isinstance(count, Tensor):
            weight = torch.where(count > 0, weight, 0.0)
        if self._scale is not None:
            weight = weight * self._scale
        if isinstance(weight, Tensor):
            return weight.detach().to(device=loss.device, dtype=loss.dtype).reshape(loss.shape)
        return torch.full_like(loss, weight)

    def _note(self, loss: Tensor, count: Count) -> None:
        """Add `count` times the loss to the sum of losses, on the device."""
        loss = loss.detach().reshape(())
        if isinstance(count, Tensor):
            self._loss_sum += torch.where(count > 0, loss * count, 0.0).reshape(()).to(self._loss_sum.device)
        else:
            self._loss_sum.add_(loss, alpha=count)

    def _close(self) -> Update:
        if self._state.micro_batches == 0:
            return self._skip("no micro-batch held a target, so there was nothing to learn", loss=math.nan, norm=None)
        self._sums.hold()
        if self._sums.empty:
            raise LossError(
                "No parameter that the optimizer steps received a gradient.",
                hint="the loss must depend on the weights of the model that was given to wb.Accumulator.",
            )
        scaled_norm = self._sums.norm()
        norm, loss_sum, targets, reference, scale, least = self._read(
            scaled_norm, self._loss_sum, self._state.targets, self._reference, self._scale, self._least
        )
        self._state.targets = int(targets) if targets.is_integer() else targets
        if not (math.isfinite(targets) and least >= 0):
            raise WeightError(
                f"The targets of a window add up to {targets}, and a micro-batch holds {least}.",
                hint="targets are what the loss averages over: 0 or more, such as (labels != -100).sum().",
            )
        if targets == 0:
            return self._skip("no micro-batch held a target, so there was nothing to learn", loss=math.nan, norm=None)
        self._precision.settle(scaled_norm)
        factor = gradient_factor(reference, targets) / scale
        norm, loss = norm * factor, loss_sum / targets
        if not (math.isfinite(norm) and math.isfinite(loss)):
            return self._refuse_nonfinite(loss, norm)
        if self._clip_norm is not None:
            factor *= min(1.0, self._clip_norm / (norm + 1e-6))
        self._sums.deliver(factor)
        lr = self._setup.lr
        with uninterrupted():
            with self._setup.step_allowed():
                for optimizer in self._setup.optimizers:
                    optimizer.step()
            self._setup.schedule(loss)
            self._sums.commit()
            self._end(Phase.CLOSED)
        return self._record(loss=loss, norm=norm, lr=lr, skipped=None)

    def _read(self, *values: Any) -> list[float]:
        """Return numbers that may live on the device, with one wait for it; None reads as 1."""
        on_device = [value for value in values if isinstance(value, Tensor)]
        wide, device = self._loss_sum.dtype, self._loss_sum.device
        read = iter(torch.stack([value.detach().reshape(()).to(device, wide) for value in on_device]).tolist())
        return [next(read) if isinstance(value, Tensor) else 1.0 if value is None else float(value) for value in values]

    def _refuse_nonfinite(self, loss: float, norm: float) -> Update:
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
        # With a loss scale, an infinite gradient under a finite loss says that the scale was too high: it has been
        # lowered.
        if self._on_nonfinite == "raise" and not (self._scale is not None and math.isfinite(loss)):
            raise NonFiniteError(
                f"A window of {self._state.micro_batches} micro-batches is not finite: {what}.",
                hint="look at the rows of this logical batch and at the learning rate; weights are as before.",
            )
        return self._skip(what, loss=loss, norm=norm)

    def _skip(self, reason: str, *, loss: float, norm: float | None) -> Update:
        self.rollback()
        return self._record(loss=loss, norm=norm, lr=self._setup.lr, skipped=reason)

    def _record(self, *, loss: float, norm: float | None, lr: float, skipped: str | None) -> Update:
        return Update(
            number=self._number,
            loss=loss,
            targets=self._state.targets,
            rows=self._state.rows,
            micro_batches=self._state.micro_batches,
            padding=self._padding,
            grad_norm=norm,
            lr=lr,
            skipped=skipped,
            peak_bytes=memory.peak_bytes(self._setup.device),
            seconds=time.perf_counter() - self._started,
        )

    def _end(self, phase: Phase) -> None:
        self._state.end(phase)
        self._ended()


def _positive(count: Count) -> Count:
    return torch.where(count > 0, count, 1) if isinstance(count, Tensor) else count
