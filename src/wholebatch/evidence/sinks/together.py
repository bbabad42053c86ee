"""How do several sinks become one that is finished whichever way a loop ends?"""

import logging
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from wholebatch.core.errors import ConfigError, WholeBatchError
from wholebatch.core.record import Update
from wholebatch.evidence.sinks.seam import Sink, SinkError, as_event

_log = logging.getLogger("wholebatch")


class Sinks:
    """Several sinks as one, for a loop of your own.

    At the end of a ``with``, also after an exception or Ctrl-C, a finish event says how the loop ended, and every sink
    is closed. A sink that fails, say because its server is gone, is closed with a warning, and the training goes on
    without it.

    Args:
        sinks: Where events go, in this order.

    Raises:
        ConfigError: One of them is no sink.

    Example:
        >>> from wholebatch.evidence.sinks import CallbackSink
        >>> def show(event):
        ...     print(event["event"], event.get("loss", event.get("status")))
        >>> with Sinks(CallbackSink(show)) as sinks:
        ...     sinks.write(Update(number=1, loss=2.5, targets=900, rows=64, micro_batches=4, lr=0.1))
        update 2.5
        finish done
    """

    def __init__(self, *sinks: Sink) -> None:
        given: list[Any] = list(sinks)
        for each in given:
            if not isinstance(each, Sink):
                raise ConfigError(
                    f"A {type(each).__name__} is no sink: it lacks write(event) or close().",
                    hint="pass one sink after the other, not in a list; and a function as CallbackSink(function).",
                )
        self._sinks: list[Sink] = given
        self._began = time.monotonic()
        self._applied = self._skipped = 0
        self._is_finished = False

    def write(self, event: Mapping[str, Any] | Update) -> None:
        """Hand an event to every sink.

        Args:
            event: A mapping with the key ``"event"``, or an update.
        """
        event = as_event(event)
        kind = event.get("event")
        if kind == "update":
            self._skipped += bool(event.get("skipped"))
            self._applied += not event.get("skipped")
        self._is_finished |= kind == "finish"
        for sink in list(self._sinks):
            try:
                sink.write(event)
            except SinkError as error:
                self._sinks.remove(sink)
                _warn(error)
                _close(sink)

    def close(self) -> None:
        """Close every sink, each of them whatever the others do."""
        sinks, self._sinks = self._sinks, []
        failure: BaseException | None = None
        for sink in sinks:
            try:
                _close(sink)
            except BaseException as error:  # not swallowed: the others are closed first
                failure = error
        if failure is not None:
            raise failure

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        status, summary = "done", ""
        if isinstance(error, KeyboardInterrupt):
            status = "interrupted"
        elif error is not None:
            found = error.found if isinstance(error, WholeBatchError) else str(error)
            status, summary = "failed", f"Failed: {type(error).__name__}: {found}"
        try:
            if not self._is_finished:
                self.write(
                    {
                        "event": "finish",
                        "status": status,
                        "updates": self._applied,
                        "skipped": self._skipped,
                        "seconds": time.monotonic() - self._began,
                        "summary": summary,
                    }
                )
        finally:
            self.close()


def _close(sink: Sink) -> None:
    try:
        sink.close()
    except SinkError as error:
        _warn(error)


def _warn(error: SinkError) -> None:
    _log.warning("%s The training goes on without this sink. hint: %s", error.found, error.hint)
