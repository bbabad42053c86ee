"""What does a run leave on disk, whatever happens to it? A log of one JSON object a line."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from wholebatch.core.errors import ConfigError
from wholebatch.core.record import Update
from wholebatch.evidence.sinks.seam import SinkError, as_event


class JsonLines:
    """A log of one JSON object a line, each on disk before the next update begins.

    An event is in the log wholly or not at all: when the disk fills up in the middle of a line, the line is taken back,
    so that writing can go on once there is space. Numbers that JSON cannot say (NaN and the infinities) become null.

    Args:
        path: The file. Missing folders are made, and an earlier file is replaced.

    Raises:
        ConfigError: The file cannot be opened for writing.

    Example:
        >>> log = JsonLines("run/log.jsonl")
        >>> log.write({"event": "update", "number": 1, "loss": float("nan")})
        >>> log.close()
        >>> print(Path("run/log.jsonl").read_text(), end="")
        {"event": "update", "number": 1, "loss": null}
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("wb", buffering=0)
        except OSError as error:
            raise ConfigError(
                f"The log {self.path} cannot be opened for writing: {_reason(error)}.",
                hint="name a folder that you may write to and whose disk has space left, as in --out runs/first.",
            ) from error

    def write(self, event: Mapping[str, Any] | Update) -> None:
        """Append one line.

        Args:
            event: An update, or a mapping of strings, numbers, and lists or mappings of them. An array or tensor of
                one element counts as a number; anything else is written as its text.

        Raises:
            SinkError: The line could not be written, or the log is closed. The log holds the events until then.
        """
        event = as_event(event)
        if self._file.closed:
            raise SinkError(
                f"The log {self.path} is closed and takes no {event.get('event')} event.",
                hint="write every event before close().",
            )
        line = memoryview((json.dumps(plain(event), allow_nan=False) + "\n").encode("ascii"))
        begin = self._file.tell()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(begin)
                self._file.seek(begin)
            raise SinkError(
                f"An event could not be written to the log {self.path}: {_reason(error)}.",
                hint=f"free some space on the disk that holds {self.path.parent}, or write the log elsewhere; "
                "the log holds every event before this one.",
            ) from error

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            self._file.close()


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def plain(value: Any) -> Any:
    """Return the same value in the words that JSON has."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return float(value) if math.isfinite(value) else None
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
    try:
        return plain(value.item())  # a number that lives in an array or a tensor
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return str(value)
