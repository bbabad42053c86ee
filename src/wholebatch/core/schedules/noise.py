"""When has the logical batch become too small? When its gradient is more noise than it may be."""

from collections.abc import Mapping
from typing import Any

from wholebatch.core.errors import ConfigError
from wholebatch.core.record import Update
from wholebatch.core.schedules.schedule import Schedule, check_size


class ByNoise(Schedule):
    """Grows as the measured gradient noise scale grows.

    A logical batch of B targets wastes ``B / (B + noise scale)`` of them. This schedule keeps to the largest size that
    wastes no more than `share`, grows by one step at a time, and never shrinks. It has to hear of each update:

        for batch in loader:
            schedule.note(accumulator.step(batch))

    and `Accumulator.updates` tells it by itself.

    A loader reads ahead, so that a decision holds from the first logical batch on that nobody has asked for yet.

    Args:
        first: The size at the beginning.
        largest: No logical batch is larger.
        share: How much of a logical batch may be wasted, in 0 to 1; with a half it grows to the noise scale.
        step: By what factor it grows.
        every: Updates from one change to the next, at least, so that the measure is that of the present size.
        smoothing: How much of what was heard before counts beside each update's noise scale, in 0 to 1. The noise scale
            is an average already (`noise_scale=...` of the accumulator).

    Raises:
        ConfigError: An argument is not what it should be.

    Example:
        >>> schedule = ByNoise(8, largest=64, every=2, smoothing=0.0)
        >>> for number in range(1, 7):
        ...     size = schedule.ask(number - 1)
        ...     schedule.note(Update(number=number, loss=1.0, targets=10 * size, rows=size, micro_batches=2, lr=0.1,
        ...                          noise_scale=330.0))
        >>> schedule.at(6), schedule.changes
        (32, {2: 16, 4: 32})
    """

    def __init__(
        self,
        first: int,
        largest: int,
        *,
        share: float = 0.5,
        step: float = 2.0,
        every: int = 50,
        smoothing: float = 0.9,
    ) -> None:
        self.first, self.largest = check_size("first", first), check_size("largest", largest)
        if self.largest < self.first:
            raise ConfigError(
                f"The largest logical batch, {largest}, is smaller than the first, {first}.",
                hint="growth goes up: pass largest >= first.",
            )
        _check_within("share", share, 0, 1, open_below=True)
        _check_within("smoothing", smoothing, 0, 1)
        if not hasattr(step, "__float__") or not step > 1:
            raise ConfigError(
                f"step={step!r} does not make a logical batch larger.", hint="pass step=2 or another above 1."
            )
        self.share, self.step, self.smoothing = float(share), float(step), float(smoothing)
        self.every = check_size("every", every)
        self.noise_scale: float | None = None
        self.changes: dict[int, int] = {}
        self._size = self.first
        self._asked = -1
        self._since = 0
        self._targets: float | None = None

    @property
    def wanted(self) -> float | None:
        """The size that wastes just the share that is allowed; None before anything was measured."""
        if self.noise_scale is None or not self._targets:
            return None
        return self.noise_scale * self.share / (1 - self.share) / self._targets

    def at(self, done: int, epoch: int | None = None) -> int:  # noqa: ARG002
        """Return the size; see `Schedule.at`."""
        passed = [when for when in self.changes if when <= done]
        return self.changes[max(passed)] if passed else self.first

    def ask(self, done: int, epoch: int | None = None) -> int:
        """Return the size, and let it stay; see `Schedule.ask`."""
        self._asked = max(self._asked, done)
        return self.at(done, epoch)

    def note(self, update: Update, size: int | None = None) -> None:
        """Hear what became of a logical batch, and grow if it is time to; see `Schedule.note`.

        Raises:
            ConfigError: How large it was is not known.
        """
        size = update.rows if size is None else size
        if size is None:
            raise ConfigError(
                "The record does not say how many rows the logical batch had, and a schedule by noise has to know.",
                hint="pass schedule.note(update, size=...), in the unit of the schedule.",
            )
        self._since += 1
        if update.noise_scale is None or not update.applied or not size:
            return
        self._targets = self._smoothed(self._targets, update.targets / size)
        self.noise_scale = self._smoothed(self.noise_scale, update.noise_scale)
        larger = min(self.largest, round(self._size * self.step))
        if self._since >= self.every and larger > self._size and (self.wanted or 0.0) >= larger:
            self._size = self.changes[self._asked + 1] = larger
            self._since = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured and when the size has changed; see `Schedule.state_dict`."""
        return {
            "changes": [[when, size] for when, size in self.changes.items()],
            "asked": self._asked,
            "since": self._since,
            "targets": self._targets,
            "noise_scale": self.noise_scale,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; see `Schedule.load_state_dict`."""
        self.changes = {int(when): int(size) for when, size in state["changes"]}
        self._size = max([self.first, *self.changes.values()])
        self._asked, self._since = int(state["asked"]), int(state["since"])
        self._targets, self.noise_scale = state["targets"], state["noise_scale"]

    def __str__(self) -> str:
        return f"{self.first} to {self.largest}, as long as no more than {self.share:.0%} is wasted"

    def _smoothed(self, before: float | None, now: float) -> float:
        return now if before is None else self.smoothing * before + (1 - self.smoothing) * now


def _check_within(name: str, value: Any, low: float, high: float, *, open_below: bool = False) -> None:
    if not hasattr(value, "__float__") or not low <= value < high or (open_below and value == low):
        raise ConfigError(
            f"{name}={value!r} of a schedule by noise does not lie in {low} to {high}.",
            hint=f"pass a number above {low} and below {high}, such as {name}=0.5.",
        )
