"""How often does a step move its learning rate schedule? Schedules are counted instead of stepped."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim.lr_scheduler import LRScheduler


class Schedule:
    """Stands where a schedule of the learning rate would, and counts.

    Args:
        stepped: Called at each step of it.
        lr: The learning rate that it tells.
    """

    def __init__(self, stepped: Callable[[Any], None], lr: float) -> None:
        self._stepped = stepped
        self._lr = lr

    def step(self, *_arguments: object, **_more: object) -> None:
        """Count."""
        self._stepped(self)

    def get_last_lr(self) -> list[float]:
        """Return the learning rate, which does not change."""
        return [self._lr]


class Count:
    """Counts the steps of each schedule by itself: two that are stepped once each are as they should be."""

    def __init__(self) -> None:
        self._steps: Counter[int] = Counter()
        self._kept: list[Any] = []  # as long as it lives, no other has its id

    def add(self, schedule: Any) -> None:
        """Count a step."""
        self._steps[id(schedule)] += 1
        self._kept.append(schedule)

    @property
    def most(self) -> int:
        """The steps of the schedule that was stepped most often."""
        return max(self._steps.values(), default=0)


@contextmanager
def counted(stepped: Callable[[Any], None]) -> Iterator[None]:
    """Let the schedules of PyTorch, wherever a step has them from, be counted instead of stepped.

    Args:
        stepped: Called with a schedule in place of its step. The first step, which a schedule makes as it is created,
            is left alone.
    """
    starting: set[int] = set()
    begin = LRScheduler._initial_step

    def initial(schedule: LRScheduler) -> None:
        starting.add(id(schedule))
        try:
            begin(schedule)
        finally:
            starting.discard(id(schedule))

    kinds = [kind for kind in _with_subclasses(LRScheduler) if "step" in vars(kind)]
    before = [(kind, vars(kind)["step"]) for kind in kinds]

    def instead(original: Callable[..., None]) -> Callable[..., None]:
        def step(schedule: LRScheduler, *arguments: Any, **more: Any) -> None:
            if id(schedule) in starting:
                original(schedule, *arguments, **more)
            else:
                stepped(schedule)

        return step

    LRScheduler._initial_step = initial  # type: ignore[method-assign, assignment]
    for kind, original in before:
        kind.step = instead(original)  # type: ignore[method-assign]
    try:
        yield
    finally:
        LRScheduler._initial_step = begin  # type: ignore[method-assign]
        for kind, original in before:
            kind.step = original  # type: ignore[method-assign]


def _with_subclasses(kind: type[LRScheduler]) -> list[type[LRScheduler]]:
    found = [kind]
    for each in kind.__subclasses__():
        found += _with_subclasses(each)
    return list(dict.fromkeys(found))
