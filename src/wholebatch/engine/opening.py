"""Which window is open? One at a time, and its optimizers step at its close and nowhere else."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import is_
from typing import Any

from torch import Tensor

from wholebatch.core.errors import ConfigError, WindowError
from wholebatch.core.weights import Count, check_count
from wholebatch.engine.meetings.company import Company, Seat, leave, sit_down
from wholebatch.engine.meetings.singly import OneByOne
from wholebatch.engine.narrow import SumIn
from wholebatch.engine.objective import plain_count
from wholebatch.engine.rules import Rules
from wholebatch.engine.setup import Setup
from wholebatch.engine.sums import GradientSum
from wholebatch.engine.window import Window


class Windows:
    """The windows of an accumulator, one after the other.

    Args:
        rules: Under which they are made.
        sum_in: How gradients of 16-bit weights are summed.

    Attributes:
        rules: In force for the next window.
        current: The window that is open, or None.
    """

    def __init__(self, rules: Rules, sum_in: SumIn) -> None:
        self.rules = rules
        self.current: Window | None = None
        self._sum_in = sum_in
        self._number = 0
        self._seats: list[Seat] = []  # of the window that is open
        weakref.finalize(self, _leave_all, self._seats).atexit = False  # where that one is lost with its accumulator
        self._left_open: Mapping[str, Any] | None = None  # a window of another process, which the next goes on with
        guard = _guard(weakref.ref(self))
        for each in rules.setup.optimizers:
            if hasattr(each, "_optimizer_step_pre_hooks"):  # a wrapper may leave out super().__init__()
                hook = each.register_step_pre_hook(guard)
                weakref.finalize(self, hook.remove)

    @property
    def made(self) -> int:
        """How many windows there were, the open one included."""
        return self._number

    def open(
        self,
        *,
        targets: Count | None = None,
        micro_batches: int = 1,
        padding: float | None = None,
        row_by_row: bool = False,
        company: Company | None = None,
        goes_on: bool = False,
    ) -> Window:
        """Open the next window.

        Args:
            targets: Of the whole window, if known. Unit: targets.
            micro_batches: About how many will come.
            padding: Share of padding, if known.
            row_by_row: Whether it is known that no layer computes over the micro-batch that it sees.
            company: What its micro-batches find where they want to meet.
            goes_on: Whether it goes on with the window that another process has left open, if there is one.

        Raises:
            WindowError: The last window is still open, or a schedule is stepped by somebody else too.
        """
        if self.current is not None:
            raise WindowError(
                "A window is open already, and two of one accumulator would share its gradient.",
                hint="close or roll back the first one (accumulator.open_window); a second model or optimizer takes an "
                "accumulator of its own.",
            )
        if self._left_open is not None and not goes_on:
            raise WindowError(
                "A window was open when the state was saved, and waits for its other micro-batches.",
                hint="go on with it: accumulator.window(); or give it up: accumulator.window().rollback().",
            )
        self.rules.setup.schedules.require_to_be_alone()
        self.rules.setup.group.open(self.renew_sums)
        self.renew_sums()
        if targets is not None:
            targets = plain_count(targets)
            check_count(targets)
            targets = None if not isinstance(targets, Tensor) and targets == 0 else targets
        self._number += 1
        self.current = Window(
            self.rules,
            number=self._number,
            targets=targets,
            micro_batches=micro_batches,
            padding=padding,
            row_by_row=row_by_row,
            company=company if isinstance(company, OneByOne) else None,
            ended=self._ended,
        )
        self._seats.append(sit_down(company))
        if self._left_open is not None:
            left, self._left_open = self._left_open, None
            self.current.load_state_dict(left)
        return self.current

    def state_dict(self) -> dict[str, Any]:
        """Return how many windows there were, and what the one that is open has come to.

        Raises:
            WindowError: It is a window of `step` or `updates`, or a backward pass is under way.
        """
        left = self._left_open
        if self.current is not None:
            if not self.current.steps_again:
                raise WindowError(
                    "An update is under way, and what it still needs is not known here.",
                    hint="save between updates, or between the micro-batches of a window of your own "
                    "(accumulator.window()).",
                )
            left = self.current.state_dict()
        return {"number": self._number - (self.current is not None), "open": left}

    def require(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of windows that sum other gradients.

        Raises:
            ConfigError: The window that was open sums them in another way.
        """
        if state["open"] is not None and not self.renew_sums().fits(state["open"]["gradients"]):
            raise ConfigError(
                "The window that was open when the state was saved sums its gradients in another way than this one.",
                hint="make the accumulator with accumulate_in=... and optimizers as in the run that was saved.",
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, after `require`."""
        self._number, self._left_open = state["number"], state["open"]

    def renew_sums(self) -> GradientSum:
        """Return the running sum of what the optimizers step now."""
        parameters = self.rules.setup.group.leaves(self.rules.setup.parameters)
        sums = self.rules.sums
        same = len(parameters) == len(sums.parameters) and all(map(is_, parameters, sums.parameters))
        if not same or [each.dtype for each in parameters] != sums.dtypes:  # a group was added, or model.bfloat16()
            self.rules = replace(self.rules, sums=gradient_sum(self.rules.setup, self._sum_in))
        return self.rules.sums

    def take_back(self, window: Window | None) -> None:
        """Undo a window that is to be made again under the same number; None: the last one, which came to nothing."""
        if window is not None and window.is_open:
            window.rollback()
        self._number -= 1

    def _ended(self) -> None:
        self.current = None
        _leave_all(self._seats)


def _leave_all(seats: list[Seat]) -> None:
    while seats:
        leave(seats.pop())


def gradient_sum(setup: Setup, sum_in: SumIn) -> GradientSum:
    """Return the running sum of the gradients of what the optimizers step."""
    leaves = setup.group.leaves
    return GradientSum(leaves(setup.parameters), leaves(setup.bystanders), sum_in, setup.consumption())


def _guard(windows: "weakref.ref[Windows]") -> Callable[..., None]:
    """A hook that keeps an optimizer from stepping inside an open window."""

    def refuse(*_arguments: object) -> None:
        owner = windows()
        if owner is not None and owner.current is not None and not owner.rules.setup.stepping:
            raise WindowError(
                "The optimizer was stepped inside an open window, before its gradient was that of the logical batch.",
                hint="leave out optimizer.step(): window.close() steps, once, at the end.",
            )

    return refuse
