"""One window on tensors: losses come in, and it becomes one update or leaves no trace."""

import copy
import math
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from wholebatch.core.errors import NonFiniteError, OutOfMemoryError, WeightError, WindowError
from wholebatch.core.record import Update
from wholebatch.core.weights import Count, Reduction
from wholebatch.core.window import Phase, WindowState
from wholebatch.engine import memory
from wholebatch.engine.backward import run_backward
from wholebatch.engine.batchnorm import require_row_by_row
from wholebatch.engine.meetings.company import OneByOne
from wholebatch.engine.noise import Noise
from wholebatch.engine.objective import Part, learns, part_of
from wholebatch.engine.precision import Precision
from wholebatch.engine.setup import OnNonFinite, Setup
from wholebatch.engine.sums import GradientSum, Mark
from wholebatch.engine.transaction import Transaction, uninterrupted
from wholebatch.engine.weighing import Weighing, widen

BatchNorm: TypeAlias = Literal["refuse", "per_micro_batch"]
"""What batch-dependent layers do to a window of more than one micro-batch."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for every window of an accumulator."""

    setup: Setup
    sums: GradientSum
    transaction: Transaction
    precision: Precision
    reduction: Reduction
    clip_norm: float | None
    on_nonfinite: OnNonFinite
    batch_norm: BatchNorm
    before_step: Callable[[], object] | None = None
    noise: Noise | None = None


_NOTHING = "no micro-batch held a target or made a loss (loss_fn returned None), so there was nothing to learn"


_MAKE_IT_AGAIN = (
    "the window was rolled back, so that weights, gradients, buffers and random state are as before; open it again and "
    "give it smaller micro-batches. accumulator.step(batch) and accumulator.updates(loader) do so by themselves."
)


def _out_of_memory(error: Exception) -> str:
    """What an error says of memory that ran out; any other is raised again."""
    if not memory.is_out_of_memory(error) or isinstance(error, OutOfMemoryError):
        raise error
    return memory.in_a_line(error)


class Window:
    """The micro-batches of one logical batch, from the first backward pass to the update.

    Made by `Accumulator.window`. It may also be used in a ``with`` statement, which closes it at the end of the
    block, or rolls it back if an exception leaves the block.

    Attributes:
        sums: The running sum of its gradients.
        row_by_row: Whether it is known that no layer computes over the rows of a part, or that this is wanted.
        steps_again: Whether a step for which memory ran out is tried a second time, since nobody makes the window
            again.

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
        rules: Rules,
        *,
        number: int,
        targets: Count | None = None,
        micro_batches: int = 1,
        padding: float | None = None,
        row_by_row: bool = False,
        company: OneByOne | None = None,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self._started = time.perf_counter()
        self._rules = rules
        self._number = number
        self._padding = padding
        self._company = company
        self._ended = ended
        self.row_by_row = row_by_row or rules.batch_norm != "refuse"
        self.steps_again = False
        self._state = WindowState()
        self._update: Update | None = None
        self._fillers = 0
        self._noise_scale: float | None = None
        self._mark: Mark | None = None
        self._marked = 0  # the first mark is where the window began
        scale = rules.precision.scale()
        self.sums = rules.sums
        early = self.sums.consumes
        self._weighing = Weighing(
            targets=targets,
            micro_batches=micro_batches,
            scale=scale,
            early=early,
            reference=rules.setup.group.reference,
        )
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
            LossError: The loss is not a scalar tensor with a graph. The window stays open.
            WeightError: The targets are missing, negative or not a number. The window stays open.
            BatchNormError: This is the second micro-batch and the model computes over the rows of a part.
            OutOfMemoryError: Memory ran out; the window was rolled back.
        """
        self._state.require_open("take a loss")
        part = part_of(loss, targets=targets, reduction=self._rules.reduction)
        try:
            self.add(part, rows=rows)
        except Exception as error:
            said = _out_of_memory(error)
        else:
            return
        del loss, part
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
            OutOfMemoryError: Memory ran out; the window was rolled back.
        """
        self._state.require_open("close")
        try:
            self._update = self._close()
        except BaseException as error:
            if self.is_open:
                self.rollback()
            if not self.steps_again or not isinstance(error, Exception):
                raise
            said = _out_of_memory(error)
        else:
            return self._update
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
        self._rules.setup.group.expect_last(self._weighing)

    @property
    def lacks_passes(self) -> bool:
        """Whether other ranks make more passes, so that this one has to make some of weight zero."""
        return self._state.micro_batches + self._fillers < self._rules.setup.group.passes

    def add_nothing(self, part: Part) -> None:
        """Run the backward pass of a micro-batch that counts for nothing, since other ranks make one of theirs.

        Args:
            part: Loss and targets.
        """
        self.rehearse(part)
        self._fillers += 1

    def rehearse(self, part: Part) -> None:
        """Run such a backward pass that no other rank waits for.

        Args:
            part: Loss and targets.
        """
        losses = [each for each in (part.loss, part.once) if each is not None and each.requires_grad]
        self.sums.open_backward()
        run_backward(losses, [torch.zeros_like(each) for each in losses])
        self.sums.close_backward()

    def before_forward(self) -> None:
        """Refuse a second forward pass that a batch-dependent layer would spoil. Not needed once `row_by_row` holds.

        Raises:
            BatchNormError: The window is cut, and the model computes over the rows of a part.
        """
        if self._state.micro_batches > 0 or self._rules.setup.group.ranks > 1:
            require_row_by_row(self._rules.setup.model)
            self.row_by_row = True

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
        if not learns(part):
            self._state.leave_out(rows=rows)
            return
        try:
            if self._company is not None:
                self._company.take_one()
            if not self.row_by_row:
                self.before_forward()
            losses, roots = self._weighing.weigh(part)
            self.sums.open_backward()
            noise = self._rules.noise
            if noise is not None:
                noise.listen(self.sums.parameters)
            run_backward(losses, roots)
            self.sums.close_backward()
            if noise is not None:
                self._weighing.note_own(noise.heard())
            self._weighing.settle()
        except BaseException as error:
            if self._rules.noise is not None:
                self._rules.noise.stop()
            if self._mark is None or not memory.is_out_of_memory(error):
                self.rollback()
            raise
        targets = part.targets
        self._state.add(rows=rows, targets=widen(targets) if isinstance(targets, Tensor) else targets)

    def mark(self) -> None:
        """Let memory run out in the next micro-batch without the end of the window: `take_back` undoes it."""
        if self._marked:
            self._rules.transaction.mark()
        self._mark, self._marked = self.sums.mark(self._mark), self._marked + 1

    def take_back(self) -> list[nn.Parameter]:
        """Undo what happened since `mark`, but for gradients that were added to those of earlier micro-batches.

        Returns:
            The parameters whose gradients were: what they have too much is to be subtracted.
        """
        assert self._mark is not None
        mark, self._mark = self._mark, None
        self._go_back()
        return self.sums.take_back(mark)

    def subtract(self, part: Part, parameters: Collection[nn.Parameter]) -> None:
        """Take a micro-batch's part out of the gradients of some parameters again, as after `take_back`.

        Args:
            part: What came of the same micro-batch, run once more as it was run before.
            parameters: Which; every other one is left as it is.
        """
        losses, roots = self._weighing.weigh(part)
        try:
            self.sums.subtract(losses, [-root for root in roots], parameters)
        finally:
            self._go_back()

    def _go_back(self) -> None:
        """Put random state and buffers back to where they were at `mark`."""
        if self._marked > 1:
            self._rules.transaction.roll_back_to_mark()
        else:
            self._rules.transaction.roll_back()

    def add_together(
        self,
        parts: Sequence[tuple[Part | None, int | None]],
        values: Sequence[Tensor] = (),
        gradients: Sequence[Tensor] = (),
    ) -> None:
        """Run one backward pass for what several micro-batches add to the objective. The caller rolls back.

        Args:
            parts: Loss and targets of each micro-batch, or None where there is nothing to learn; and its rows, if
                known.
            values: Further tensors at which gradients enter.
            gradients: These gradients, the loss scale included.
        """
        losses, roots = list(values), list(gradients)
        counted = [(part, rows) for part, rows in parts if part is not None and learns(part)]
        for part, _ in counted:
            weighed = zip(*self._weighing.weigh(part), strict=True)
            self._weighing.note_own(None)  # what one adds depends on the others
            self._weighing.settle()
            for loss, root in weighed:
                if loss.requires_grad:  # a loss of nothing but what met is a constant in the second pass of a replay
                    losses.append(loss)
                    roots.append(root)
        if losses:
            self.sums.open_backward()
            run_backward(losses, roots)
            self.sums.close_backward()
        for part, rows in counted:
            targets = part.targets
            self._state.add(rows=rows, targets=widen(targets) if isinstance(targets, Tensor) else targets)
        for left_out, rows in parts:
            if left_out is None or not learns(left_out):
                self._state.leave_out(rows=rows)

    @property
    def reference(self) -> Count:
        """What every loss of this process is divided by. Unit: targets."""
        return self._weighing.reference

    def state_dict(self) -> dict[str, Any]:
        """Return what the window has come to, for a window of another process that goes on with it.

        Raises:
            WindowError: A backward pass is under way, or gradients were taken in as they arrived.
        """
        return {
            "micro-batches": self._state.micro_batches,
            "rows": self._state.rows,
            "targets": self._state.targets,
            "weighed": self._weighing.state_dict(),
            "gradients": self.sums.state_dict(),
            "begun": self._rules.transaction.state_dict(),
            "group": self._rules.setup.group.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what another window has come to, before the first micro-batch of this one."""
        device = self._rules.setup.device
        targets = state["targets"]
        self._state.micro_batches, self._state.rows = state["micro-batches"], state["rows"]
        self._state.targets = targets.to(device) if isinstance(targets, Tensor) else targets
        self._weighing.load_state_dict(state["weighed"], device)
        self.sums.load_state_dict(state["gradients"])
        self._rules.transaction.load_state_dict(state["begun"])
        self._rules.setup.group.load_state_dict(state["group"])

    def rehearsal(self) -> Weighing:
        """Return what weighs losses as this window does, before the first of them, and notes nothing in it."""
        return copy.copy(self._weighing)

    def weigh_like(self, rehearsal: Weighing) -> None:
        """Divide losses by what they were divided by in a rehearsal, whichever comes first now."""
        self._weighing.divide_like(rehearsal)

    def _close(self) -> Update:
        group = self._rules.setup.group
        self._mark = None  # or it would keep gradients that are used up one by one
        self.sums.hold()
        read = group.settle(self.sums, self._weighing, self._state)
        self._state.targets = int(read.targets) if read.targets % 1 == 0 else read.targets
        if not (math.isfinite(read.targets) and read.least >= 0):
            raise WeightError(
                f"The targets of a window add up to {read.targets}, and a micro-batch holds {read.least}.",
                hint="targets are what the loss averages over: 0 or more, such as (labels != -100).sum().",
            )
        if read.targets == 0:
            return self._skip(_NOTHING, loss=math.nan, norm=None)
        if not (math.isfinite(read.norm) and math.isfinite(read.loss)):
            self._rules.precision.settle(read.scaled_norm)
            return self._refuse_nonfinite(read.loss, read.norm)
        clip = 1.0 if self._rules.clip_norm is None else min(1.0, self._rules.clip_norm / (read.norm + 1e-6))
        lr = self._rules.setup.lr
        with uninterrupted():
            with group.moving(), self._rules.precision.settling(read.scaled_norm):
                group.deliver(self.sums, read.factor * clip)
                if self._rules.before_step is not None:
                    self._rules.before_step()
                late = self._step()
                torch.clear_autocast_cache()  # or an autocast around the whole loop would go on with the old weights
            self.sums.commit()
            self._end(Phase.CLOSED)
            if self._rules.noise is not None:
                self._noise_scale = self._rules.noise.take_in(read)
            self._update = self._record(loss=read.loss, norm=read.norm, lr=lr, skipped=None)
            self._rules.setup.schedules.step(read.loss)
        if late is not None:
            raise late
        return self._update

    def _step(self) -> BaseException | None:
        """Step the optimizers; a second time, in pieces, where memory ran out and nobody makes the window again."""
        if self.steps_again or self._rules.setup.group.ranks > 1:
            try:
                return self._rules.setup.step()
            except Exception as error:
                _out_of_memory(error)
            memory.free_cached(self._rules.setup.device)
        return self._rules.setup.step()

    def _refuse_nonfinite(self, loss: float, norm: float) -> Update:
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
        # With a loss scale, an infinite gradient under a finite loss says that the scale was too high: it has been
        # lowered.
        if self._rules.on_nonfinite == "raise" and not (self._weighing.scaled and math.isfinite(loss)):
            raise NonFiniteError(
                f"A window of {self._state.micro_batches} micro-batches is not finite: {what}.",
                hint="look at the rows of this logical batch and at the learning rate; weights are as before.",
            )
        return self._skip(what, loss=loss, norm=norm)

    def _skip(self, reason: str, *, loss: float, norm: float | None) -> Update:
        self.rollback()
        return self._record(loss=loss, norm=norm, lr=self._rules.setup.lr, skipped=reason)

    def _record(self, *, loss: float, norm: float | None, lr: float, skipped: str | None) -> Update:
        return Update(
            number=self._number,
            loss=loss,
            targets=self._state.targets,
            rows=self._state.rows,
            micro_batches=self._state.micro_batches,
            padding=self._padding,
            grad_norm=None if self.sums.consumes else norm,
            lr=lr,
            skipped=skipped,
            peak_bytes=memory.peak_bytes(self._rules.setup.device),
            seconds=time.perf_counter() - self._started,
            noise_scale=self._noise_scale,
        )

    def _end(self, phase: Phase) -> None:
        self._mark = None
        self._state.end(phase)
        self._rules.setup.group.end()
        self._ended()
