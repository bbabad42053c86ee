"""What is a system? A name, what must be installed, and how it is used."""

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from wholebatch.evidence.conformance.task import PairTask, Task, Trained


@dataclass(frozen=True, slots=True)
class System:
    """Something that trains, driven as its documentation says.

    Attributes:
        name: As in ``--system NAME``.
        title: How it is called in a table, with the way in which it is used.
        train: Trains a task. What it raises is a refusal, in the system's own words; a `NotExpressible` says that there
            is no documented way.
        expresses: What it can be asked beyond windows of micro-batches, in the words of `Task.asks`.
        distributions: What has to be installed.
        install: The command that does it.
        environment: Variables to be set before it is loaded.
        requires: What it has to be asked for, in the same words: a way to train on several ranks is not judged alone.
        rounding: The relative error that is its rounding, where it computes in a narrower dtype than the weights have;
            a scene with a smaller tolerance is judged with this one.
        lacks: Why it cannot be asked some of what is not in `expresses`, each a reason by its word.
    """

    name: str
    title: str
    train: Callable[[Task | PairTask], Trained]
    expresses: frozenset[str]
    distributions: tuple[str, ...] = ()
    install: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    requires: frozenset[str] = frozenset()
    rounding: float = 0.0
    lacks: Mapping[str, str] = field(default_factory=dict)

    def versions(self) -> dict[str, str] | None:
        """Return the versions of its distributions, or None where one is not installed."""
        try:
            return {name: importlib.metadata.version(name) for name in self.distributions}
        except importlib.metadata.PackageNotFoundError:
            return None
