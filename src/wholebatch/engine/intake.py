"""What does a window take in? The backward passes of its micro-batches, and how much they were of."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wholebatch.core.errors import LossError
from wholebatch.core.weights import Count
from wholebatch.core.window import WindowState
from wholebatch.engine.backward import run_backward
from wholebatch.engine.batchnorm import require_row_by_row
from wholebatch.engine.meetings.singly import OneByOne
from wholebatch.engine.objective import Part, learns
from wholebatch.engine.rules import Rules
from wholebatch.engine.weighing import Weighing, widen


class Intake:
    """Weighs the losses of one window, runs their backward passes and counts. Whoever calls it rolls back.

    Args:
        rules: Of the accumulator.
        weighing: Weighs its losses.
        row_by_row: Whether it is known that no layer computes over the rows of a part.
        company: What the micro-batches of a window of somebody's own find where they want to meet.

    Attributes:
        state: What was taken in so far.
        weighing: As given.
        row_by_row: Whether it is known that no layer computes over the rows of a part, or that this is wanted.
    """

    def __init__(self, rules: Rules, weighing: Weighing, *, row_by_row: bool, company: OneByOne | None) -> None:
        self.state = WindowState()
        self.weighing = weighing
        self.row_by_row = row_by_row or rules.batch_norm != "refuse"
        self._sums = rules.sums
        self._noise = rules.noise
        self._setup = rules.setup
        self._company = company
        self._fillers = 0

    def before_forward(self) -> None:
        """Refuse a second forward pass that a batch-dependent layer would spoil. Not needed once `row_by_row` holds.

        Raises:
            BatchNormError: The window is cut, and the model computes over the rows of a part.
        """
        if self.state.micro_batches > 0 or self._setup.group.ranks > 1:
            require_row_by_row(self._setup.model)
            self.row_by_row = True

    def add(self, part: Part | None, *, rows: int | None) -> None:
        """Run the backward pass of a micro-batch's part of the objective.

        Args:
            part: Loss and targets, or None where there is nothing to learn.
            rows: The micro-batch's rows, if known. Unit: rows.
        """
        if not learns(part):
            self._end_pass(part)
            self.state.leave_out(rows=rows)
            return
        if self._company is not None:
            self._company.take_one()
        if not self.row_by_row:
            self.before_forward()
        losses, roots = self.weighing.weigh(part)
        if self._noise is None:
            self._backward(losses, roots)
        else:
            square = self._noise.hear(self._sums.parameters, lambda: self._backward(losses, roots))
            self.weighing.note_own(square)
        self.weighing.settle()
        self._count(part, rows)

    def add_together(
        self,
        parts: Sequence[tuple[Part | None, int | None]],
        values: Sequence[Tensor] = (),
        gradients: Sequence[Tensor] = (),
    ) -> None:
        """Run one backward pass for what several micro-batches add to the objective.

        Args:
            parts: Loss and targets of each micro-batch, or None where there is nothing to learn; and its rows, if
                known.
            values: Further tensors at which gradients enter.
            gradients: These gradients, the loss scale included.
        """
        losses, roots = list(values), list(gradients)
        for part, _ in parts:
            if not learns(part):
                continue
            weighed = zip(*self.weighing.weigh(part), strict=True)
            self.weighing.note_own(None)  # what one adds depends on the others
            self.weighing.settle()
            for loss, root in weighed:
                if loss.requires_grad:  # a loss of nothing but what met is a constant in the second pass of a replay
                    losses.append(loss)
                    roots.append(root)
        if losses:
            self._backward(losses, roots)
        for part, rows in parts:
            if learns(part):
                self._count(part, rows)
            else:
                self.state.leave_out(rows=rows)

    @property
    def lacks_passes(self) -> bool:
        """Whether other ranks make more passes, so that this one has to make some of weight zero."""
        return self.state.micro_batches + self._fillers < self._setup.group.passes

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
        self._backward(losses, [torch.zeros_like(each) for each in losses])

    def rehearsal(self) -> Weighing:
        """Return what weighs losses as this window does, before the first of them, and notes nothing in it."""
        return copy.copy(self.weighing)

    def state_dict(self) -> dict[str, Any]:
        """Return what was taken in so far, but for the gradients."""
        return {
            "micro-batches": self.state.micro_batches,
            "rows": self.state.rows,
            "targets": self.state.targets,
            "weighed": self.weighing.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, before the first micro-batch."""
        device = self._setup.device
        targets = state["targets"]
        self.state.micro_batches, self.state.rows = state["micro-batches"], state["rows"]
        self.state.targets = targets.to(device) if isinstance(targets, Tensor) else targets
        self.weighing.load_state_dict(state["weighed"], device)

    def _end_pass(self, part: Part | None) -> None:
        """Let no other rank wait in a pass that turned out to count for nothing."""
        begun = self._setup.group.in_pass
        if part is None and begun:
            raise LossError(
                'With communication="each" the other ranks wait for a backward pass, and the loss function returned '
                "None after the forward pass.",
                hint="return the loss and no targets, as in (loss_sum, 0), or None before the model is called.",
            )
        if part is not None and begun is not False and part.loss.requires_grad:
            self.add_nothing(part)

    def _backward(self, losses: Sequence[Tensor], roots: Sequence[Tensor]) -> None:
        self._sums.open_backward()
        if self._company is None:
            run_backward(losses, roots)
        else:
            with self._company.recomputing():
                run_backward(losses, roots)
        self._sums.close_backward()

    def _count(self, part: Part, rows: int | None) -> None:
        targets: Count = part.targets
        self.state.add(rows=rows, targets=widen(targets) if isinstance(targets, Tensor) else targets)
