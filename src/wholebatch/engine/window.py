"""One window on tensors: losses come in, and it becomes one update or leaves no trace."""

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from wholebatch.core.errors import OutOfMemoryError, WindowError
from wholebatch.core.record import Update
from wholebatch.core.weights import Count
from wholebatch.core.window import Phase
from wholebatch.engine import memory
from wholebatch.engine.closing import move, why_skipped
from wholebatch.engine.copies import NotCopied
from wholebatch.engine.intake import Intake
from wholebatch.engine.meetings.singly import OneByOne
from wholebatch.engine.objective import Part, part_of
from wholebatch.engine.retraction import Retraction
from wholebatch.engine.rules import Rules
from wholebatch.engine.uninterrupted import uninterrupted
from wholebatch.engine.weighing import Reading, Weighing

_MAKE_IT_AGAIN = (
    "the window was rolled back, so that weights, gradients, buffers and random state are as before; open it again and "
    "give it smaller micro-batches. accumulator.step(batch) and accumulator.updates(loader) do so by themselves."
)
_MADE_ONCE = (
    "the update was made and is not made again, but a schedule (lr_scheduler) may not have been stepped: look at the "
    "learning rate before you go on, or go on from the last checkpoint."
)


class Window(NotCopied):
    """The micro-batches of one logical batch, from the first backward pass to the update.

    Made by `Accumulator.window`. It may also be used in a ``with`` statement, which closes it at the end of the
    block, or rolls it back if an exception leaves the block.

    Attributes:
        sums: The running sum of its gradients.
        intake: What it takes in.
        retraction: Takes a micro-batch back.
        steps_again: Whether a step for which memory ran out is tried a second time, since nobody makes the window
            again.

    Example:
        >>> import torch
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
        rules: Rules,
        *,
        number: int,
        targets: Count | None,
        micro_batches: int,
        padding: float | None,
        row_by_row: bool,
        company: OneByOne | None,
        ended: Callable[[], None],
    ) -> None:
        self._started = time.perf_counter()
        self._rules = rules
        self._number = number
        self._padding = padding
        self._ended = ended
        self._update: Update | None = None
        self.steps_again = False
        self.sums = rules.sums
        scale = rules.precision.scale()
        weighing = Weighing(
            targets=targets,
            micro_batches=micro_batches,
            scale=scale,
            early=self.sums.consumes,
            reference=rules.setup.group.reference,
        )
        self.intake = Intake(rules, weighing, row_by_row=row_by_row, company=company)
        self._state = self.intake.state
        self.retraction = Retraction(self.sums, rules.transaction, weighing)
        memory.reset_peak(rules.setup.device)
        rules.transaction.begin()
        rules.sums.start(scale)

    @property
    def is_open(self) -> bool:
        """Whether the window still takes losses."""
        return self._state.phase is Phase.OPEN

    @property
    def is_empty(self) -> bool:
        """Whether no micro-batch has added to the gradient yet."""
        return self._state.micro_batches == 0

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
            targets: What the loss averages over: a number, or a tensor that stays on its device. Unit: targets. Where
                a tensor on an accelerator may be 0, hand in the pair ``(loss_sum, targets)``: a mean over nothing is
                not a number.
            rows: The micro-batch's rows, for the record. Unit: rows.

        Raises:
            WindowError: The window has ended, or somebody else changed the gradients in the meantime.
            LossError: The loss is not a scalar tensor with a graph (the window stays open); its graph is used up, or a
                term that acts once a window came with some micro-batches only (the window was rolled back).
            WeightError: The targets are missing, negative or not a number. The window stays open.
            BatchNormError: This is the second micro-batch and the model computes over the rows of a part.
            OutOfMemoryError: Memory ran out; the window was rolled back.
        """
        self._state.require_open("take a loss")
        part = part_of(loss, targets=targets, reduction=self._rules.reduction)
        try:
            self.add(part, rows=rows)
        except Exception as error:
            said = memory.said_of_shortage(error)
        else:
            return
        del loss, part
        if self.is_open:  # as after `Retraction.mark`, where `add` leaves it so
            self.rollback()
        raise OutOfMemoryError(
            f"Memory ran out in the backward pass of micro-batch {self._state.micro_batches + 1} of a window ({said}).",
            hint=_MAKE_IT_AGAIN,
        )

    def close(self) -> Update:
        """Turn the window into one update: divide, clip, step the optimizers and the schedules.

        Returns:
            The record of the update, or of why there was none.

        Raises:
            WindowError: The window has ended before, or somebody else changed the gradients in the meantime.
            NonFiniteError: The loss or the gradient is not finite, and ``on_nonfinite="raise"``.
            LossError: No parameter that an optimizer steps received a gradient.
            RankError: Another rank failed, rolled its window back, or is gone.
            WeightError: Targets that were counted on the device turn out to be negative or not a number.
            OutOfMemoryError: Memory ran out; the window was rolled back, unless it says that the weights had moved.
        """
        self._state.require_open("close")
        try:
            self._update = self._close()
        except BaseException as error:
            moved = self._state.phase is Phase.CLOSED
            if self.is_open:
                self.rollback()
            if not (self.steps_again or moved) or not isinstance(error, Exception):
                raise
            said = memory.said_of_shortage(error)
        else:
            return self._update
        if moved:
            raise OutOfMemoryError(f"Memory ran out after the weights had moved ({said}).", hint=_MADE_ONCE)
        raise OutOfMemoryError(f"Memory ran out at the end of a window ({said}).", hint=_MAKE_IT_AGAIN)

    def rollback(self) -> None:
        """End the window as if nothing had happened: gradients, buffers and random state are what they were.

        Raises:
            WindowError: The window has ended before.
        """
        self._state.require_open("roll back")
        self._rules.transaction.roll_back()
        self.sums.roll_back()
        self._end(Phase.ROLLED_BACK)
        self._rules.setup.group.withdraw(sys.exception())

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

    def expect_last(self) -> None:
        """Say that the next micro-batch is the last of this process, so that ranks speak during its backward pass."""
        self._rules.setup.group.expect_last(self.intake.weighing)

    def add(self, part: Part | None, *, rows: int | None) -> None:
        """Take in a micro-batch's part of the objective, or roll the window back, unless only that is to be taken back.

        Args:
            part: Loss and targets, or None where there is nothing to learn.
            rows: The micro-batch's rows, if known. Unit: rows.
        """
        try:
            self.intake.add(part, rows=rows)
        except BaseException as error:
            if not self.retraction.possible or not memory.is_out_of_memory(error):
                self.rollback()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return what the window has come to, for a window of another process that goes on with it.

        Raises:
            WindowError: A backward pass is under way, or gradients were taken in as they arrived.
        """
        return {
            **self.intake.state_dict(),
            "gradients": self.sums.state_dict(),
            "begun": self._rules.transaction.state_dict(),
            "group": self._rules.setup.group.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what another window has come to, before the first micro-batch of this one."""
        self.intake.load_state_dict(state)
        self.sums.load_state_dict(state["gradients"])
        self._rules.transaction.load_state_dict(state["begun"])
        self._rules.setup.group.load_state_dict(state["group"])

    def _close(self) -> Update:
        setup, noise = self._rules.setup, self._rules.noise
        self.retraction.forget()  # or it would keep gradients that are used up one by one
        self.sums.hold()
        read = setup.group.settle(self.sums, self.intake.weighing, self._state)
        self._state.targets = int(read.targets) if read.targets % 1 == 0 else read.targets
        scaled, micro_batches = self.intake.weighing.scaled, self._state.micro_batches
        skipped = why_skipped(self._rules, read, scaled=scaled, micro_batches=micro_batches)
        if skipped is not None:
            self.rollback()
            return self._record(read, lr=setup.lr, skipped=skipped)
        lr = setup.lr
        attempts = 1 + self.steps_again if setup.group.ranks == 1 else 4  # others step now, so this one has to
        with uninterrupted():
            late = move(self._rules, read, attempts=attempts)
            self.sums.commit()
            self._end(Phase.CLOSED)
            noise_scale = noise.take_in(read) if noise is not None else None
            self._update = self._record(read, lr=lr, noise_scale=noise_scale)
            setup.schedules.step(read.loss)
        if late is not None:
            raise late
        return self._update

    def _record(
        self, read: Reading, *, lr: float, skipped: str | None = None, noise_scale: float | None = None
    ) -> Update:
        return Update(
            number=self._number,
            loss=read.loss,
            targets=self._state.targets,
            rows=self._state.rows,
            micro_batches=self._state.micro_batches,
            padding=self._padding,
            grad_norm=None if self.sums.consumes or read.targets == 0 else read.norm,
            lr=lr,
            skipped=skipped,
            peak_bytes=memory.peak_bytes(self._rules.setup.device),
            seconds=time.perf_counter() - self._started,
            noise_scale=noise_scale,
        )

    def _end(self, phase: Phase) -> None:
        self.retraction.forget()
        self._state.end(phase)
        self._rules.setup.group.end()
        self._ended()
