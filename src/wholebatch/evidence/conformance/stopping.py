"""How does a run go on that was stopped? Another one begins anew, and knows only what the first left in a folder."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wholebatch.evidence.conformance.task import Task, Trained


@dataclass(frozen=True, slots=True)
class Process:
    """One of the processes in which a run is made.

    Attributes:
        begins_at: The micro-batch (counted through the run) that is its first; where that is not 0, it takes over what
            the one before has left.
        ends_before: The micro-batch that it does not come to; None where it goes to the end.
        folder: Where it finds and leaves what the next one needs, by the means of its system.
    """

    begins_at: int = 0
    ends_before: int | None = None
    folder: Path = Path()


class Stopped(Exception):  # noqa: N818 - what happens in a scene, not an error
    """The process ends here.

    Args:
        updates: Made until then.
        losses: What the system has reported of each; None where it reports none.
    """

    def __init__(self, updates: int, losses: Sequence[float] | None = None) -> None:
        super().__init__(f"stopped after {updates} updates")
        self.updates, self.losses = updates, losses


def in_processes(task: Task, run: Callable[[Task, Process], Trained]) -> Trained:
    """Train a task to its end: at once, or, where it stops inside a window, in two runs that share a folder.

    Both runs are made in this process. The second makes everything anew, and knows which micro-batch is next.

    Args:
        task: What is asked.
        run: Trains as far as a process goes. Where that ends before the run does, it leaves what the next one needs and
            raises `Stopped`.
    """
    if task.stops_before is None:
        return run(task, Process())
    with tempfile.TemporaryDirectory(prefix="wholebatch-stopped-") as folder:
        try:
            run(task, Process(ends_before=task.stops_before, folder=Path(folder)))
        except Stopped as stopped:
            before = stopped
        else:
            raise AssertionError("the first run came to its end")
        trained = run(task, Process(begins_at=task.stops_before, folder=Path(folder)))
    losses = None if before.losses is None or trained.losses is None else [*before.losses, *trained.losses]
    return replace(trained, updates=before.updates + trained.updates, losses=losses)
