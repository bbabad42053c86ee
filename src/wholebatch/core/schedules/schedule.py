"""How large is the next logical batch? Fixed, stepped, or grown from one size to another."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from wholebatch.core.errors import ConfigError
from wholebatch.core.record import Update

By: TypeAlias = Literal["update", "epoch"]
"""What a schedule counts."""


class Schedule(ABC):
    """How large each logical batch is.

    The unit is that of whoever asks: rows for `wb.LogicalBatches`, micro-batches for `Accumulator.updates`. What `ask`
    has answered once is answered again, so that a run that goes on draws the logical batches that the first one drew.

    Attributes:
        epoch: Which epoch it is, from 0, for those who ask without saying so.
    """

    epoch: int = 0

    @abstractmethod
    def at(self, done: int, epoch: int | None = None) -> int:
        """Return the size of one logical batch.

        Args:
            done: How many logical batches came before it, over all epochs.
            epoch: In which epoch it is, from 0. Default: as `set_epoch` has said.
        """

    def ask(self, done: int, epoch: int | None = None) -> int:
        """Return the size of one logical batch that is made now, so that it stays as it is; see `at`."""
        return self.at(done, epoch)

    @abstractmethod
    def __str__(self) -> str:
        """Say it in words."""

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins.

        Args:
            epoch: From 0.
        """
        self.epoch = epoch

    def note(self, update: Update, size: int | None = None) -> None:  # noqa: B027 - most need not listen
        """Hear what became of a logical batch. Only a schedule that goes by measurements listens.

        Args:
            update: Its record.
            size: How large it was. Default: the rows of the record.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what the next process needs. Made of numbers, lists and dicts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most have no state
        """Go on from there."""


class Fixed(Schedule):
    """Every logical batch is equally large.

    Args:
        size: How large.

    Raises:
        ConfigError: That is no size.

    Example:
        >>> Fixed(64).at(10_000)
        64
    """

    def __init__(self, size: int) -> None:
        self.size = check_size("size", size)

    def at(self, done: int, epoch: int | None = None) -> int:  # noqa: ARG002
        """Return the size; see `Schedule.at`."""
        return self.size

    def __str__(self) -> str:
        return f"{self.size}"


class Stepped(Schedule):
    """Another size from each milestone on.

    Args:
        first: The size until the first milestone.
        milestones: After how many updates or epochs each other size begins.
        by: What is counted. Updates are logical batches, also those that were skipped.

    Raises:
        ConfigError: A size or a milestone is none.

    Example:
        >>> schedule = Stepped(64, {1000: 128, 3000: 256})
        >>> schedule.at(999), schedule.at(1000), schedule.at(5000)
        (64, 128, 256)
    """

    def __init__(self, first: int, milestones: Mapping[int, int], *, by: By = "update") -> None:
        self.first = check_size("first", first)
        if not hasattr(milestones, "items"):
            raise ConfigError(
                f"milestones is a {type(milestones).__name__}, and does not say which size begins when.",
                hint="pass a dict from updates or epochs to sizes, such as {1000: 128, 3000: 256}.",
            )
        self.milestones = {check_size("milestone", when): check_size("size", size) for when, size in milestones.items()}
        self.by = check_by(by)

    def at(self, done: int, epoch: int | None = None) -> int:
        """Return the size; see `Schedule.at`."""
        count = _counted(self, self.by, done, epoch)
        passed = [when for when in self.milestones if when <= count]
        return self.milestones[max(passed)] if passed else self.first

    def __str__(self) -> str:
        steps = [f", {size} after {self.by} {when}" for when, size in sorted(self.milestones.items())]
        return f"{self.first}" + "".join(steps)


class _Growing(Schedule):
    """Grows from one size to another, and stays there.

    Args:
        first: The size at the beginning.
        last: The size at the end, and from then on. May be smaller.
        over: After how many updates or epochs it is reached.
        by: What is counted.
        multiple: Sizes between the two are multiples of this, such as the number of ranks.

    Raises:
        ConfigError: A size or a number is none.
    """

    def __init__(self, first: int, last: int, *, over: int, by: By = "update", multiple: int = 1) -> None:
        self.first, self.last = check_size("first", first), check_size("last", last)
        self.over, self.by = check_size("over", over), check_by(by)
        self.multiple = check_size("multiple", multiple)

    def at(self, done: int, epoch: int | None = None) -> int:
        """Return the size; see `Schedule.at`."""
        share = _counted(self, self.by, done, epoch) / self.over
        if share <= 0.0 or share >= 1.0:
            return self.last if share else self.first
        # Rounded to a multiple, no farther than the two ends; and a hair, so that 128 is not 127.99999999999999.
        rounded = self.multiple * math.floor(self._between(share) / self.multiple * (1 + 1e-12))
        return max(min(self.first, self.last), min(max(self.first, self.last), rounded))

    @abstractmethod
    def _between(self, share: float) -> float:
        """Return the size after a share of the way."""

    def _way(self, steps: str) -> str:
        count = f"{self.over} {self.by}{'s' * (self.over != 1)}"
        return f"{self.first} to {self.last} {steps} over {count}"


class Linear(_Growing):
    """Grows by the same number each time.

    Args:
        first: The size at the beginning.
        last: The size at the end, and from then on. May be smaller.
        over: After how many updates or epochs it is reached.
        by: What is counted.
        multiple: Sizes between the two are multiples of this, such as the number of ranks.

    Raises:
        ConfigError: A size or a number is none.

    Example:
        >>> schedule = Linear(64, 256, over=300, multiple=8)
        >>> [schedule.at(done) for done in (0, 100, 150, 300, 900)]
        [64, 128, 160, 256, 256]
    """

    def _between(self, share: float) -> float:
        return self.first + (self.last - self.first) * share

    def __str__(self) -> str:
        return self._way("in equal steps")


class Geometric(_Growing):
    """Grows by the same factor each time.

    Args:
        first: The size at the beginning.
        last: The size at the end, and from then on. May be smaller.
        over: After how many updates or epochs it is reached.
        by: What is counted.
        multiple: Sizes between the two are multiples of this.

    Raises:
        ConfigError: A size or a number is none.

    Example:
        >>> schedule = Geometric(64, 1024, over=4, by="epoch")
        >>> [schedule.at(0, epoch) for epoch in range(6)]
        [64, 128, 256, 512, 1024, 1024]
    """

    def _between(self, share: float) -> float:
        return self.first * math.exp(share * math.log(self.last / self.first))

    def __str__(self) -> str:
        return self._way("by equal factors")


def check_size(name: str, size: Any) -> int:
    """Return a whole number of at least 1.

    Raises:
        ConfigError: It is none.
    """
    if isinstance(size, bool) or not hasattr(size, "__index__") or size < 1:
        raise ConfigError(
            f"{name}={size!r} in a schedule of logical batches is no whole number of at least 1.",
            hint="sizes are whole rows or micro-batches, and milestones whole updates or epochs.",
        )
    return int(size.__index__())


def check_by(by: Any) -> By:
    """Return what a schedule counts.

    Raises:
        ConfigError: It is not one of the two.
    """
    if by not in ("update", "epoch"):
        raise ConfigError(f"by={by!r} is nothing that a schedule counts.", hint='pass by="update" or by="epoch".')
    counted: By = by
    return counted


def _counted(schedule: Schedule, by: By, done: int, epoch: int | None) -> int:
    if by == "update":
        return done
    return schedule.epoch if epoch is None else epoch
