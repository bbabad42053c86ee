"""What is a sink? Two methods, so that anything can be one; a function is one too."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from wholebatch.core.errors import ConfigError, WholeBatchError
from wholebatch.core.record import Update


class SinkError(WholeBatchError, OSError):
    """What was written could not be kept: no disk space, a disk that is gone, or a sink that was closed."""


@runtime_checkable
class Sink(Protocol):
    """What takes the events of a run.

    Example:
        >>> class Count:
        ...     updates = 0
        ...     def write(self, event):
        ...         self.updates += event["event"] == "update"
        ...     def close(self):
        ...         print(f"{self.updates} updates")
        >>> sink: Sink = Count()
        >>> sink.write({"event": "update", "number": 1, "loss": 2.5})
        >>> sink.close()
        1 updates
    """

    def write(self, event: Mapping[str, Any]) -> None:
        """Take one event. It belongs to the caller and may be read, not changed."""
        ...

    def close(self) -> None:
        """Take no more events, and finish what is under way. Closing twice is closing once."""
        ...


def as_event(event: Mapping[str, Any] | Update) -> Mapping[str, Any]:
    """Return an event as the mapping that it is; an update is one too.

    Example:
        >>> as_event(Update(number=1, loss=2.5, targets=900, rows=64, micro_batches=4, lr=0.1))["event"]
        'update'
    """
    return {"event": "update", **event.to_dict()} if isinstance(event, Update) else event


class CallbackSink:
    """A sink that hands each event to a function, the seam to whatever else shall see it.

    Args:
        function: Called with each event, in order.

    Raises:
        ConfigError: It cannot be called.

    Example:
        >>> sink = CallbackSink(lambda event: print(event["number"], event["loss"]))
        >>> sink.write({"event": "update", "number": 1, "loss": 2.5})
        1 2.5
    """

    def __init__(self, function: Callable[[Mapping[str, Any]], object]) -> None:
        if not callable(function):
            raise ConfigError(
                f"A callback is a {type(function).__name__}, which cannot be called.",
                hint="pass a function of an event, such as lambda event: print(event['loss']).",
            )
        self._function = function

    def write(self, event: Mapping[str, Any] | Update) -> None:
        """Call the function with the event; an update is handed over as a mapping of its fields."""
        self._function(as_event(event))

    def close(self) -> None:
        """Do nothing: the function belongs to the caller."""
