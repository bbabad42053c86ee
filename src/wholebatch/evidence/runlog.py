"""What does the log of a run hold? The events of a run folder, read back."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wholebatch.core.errors import ConfigError
from wholebatch.evidence.wording import Event, number, one_line, text

LOG_NAME = "log.jsonl"
_FROM_A_RUN = "name the folder that `wholebatch train ... --out FOLDER` wrote."


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The events of one run, by kind and in their order.

    Attributes:
        path: The log that was read.
        start: The start event; empty when there was none.
        updates: The update events, skipped ones too.
        validations: The validation events.
        evidence: The evidence event; empty when nothing was measured.
        finish: The finish event; empty when the log ends early.
        notes: What was odd about the log, as sentences.

    Example:
        >>> run = Run(path=Path("log.jsonl"), updates=({"number": 1, "loss": 2.5}, {"number": 2, "loss": None}))
        >>> run.series("loss"), run.status
        ([2.5, nan], 'ended early')
    """

    path: Path
    start: Event = field(default_factory=dict)
    updates: tuple[Event, ...] = ()
    validations: tuple[Event, ...] = ()
    evidence: Event = field(default_factory=dict)
    finish: Event = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """Return "done", "interrupted", "failed", or "ended early" when the log does not say how the run ended."""
        return text(self.finish, "status") or "ended early"

    def series(self, name: str) -> list[float]:
        """Return one field of every update, NaN where it was not measured."""
        values = (number(update, name) for update in self.updates)
        return [math.nan if value is None else value for value in values]


def read_log(path: str | Path) -> Run:
    """Return the run that a log describes.

    A process that is killed leaves its last line unfinished; that line is left out, and a note says so. Kinds of events
    that are not known here are left out without a word. A log of several runs is read as its last one.

    Args:
        path: A run folder, or the log in it.

    Returns:
        The events by kind.

    Raises:
        ConfigError: There is no such file, a folder without a log, or a line that is not an event.

    Example:
        >>> _ = Path("log.jsonl").write_text('{"event": "update", "number": 1, "loss": 2.5}\\n')
        >>> read_log(".").updates[0]["loss"]
        2.5
    """
    log = _log_of(Path(path))
    try:
        lines = log.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(
            f"The log {log} cannot be read: {error.strerror}.", hint="make the file readable, or copy it elsewhere."
        ) from error
    unfinished = lines.pop()  # what stands after the last line break: nothing, unless the process was killed
    events = [_event(line, log, where) for where, line in enumerate(lines, 1) if line.strip()]
    notes = []
    if unfinished.strip():
        try:
            events.append(_event(unfinished, log, len(lines) + 1))
        except ConfigError:
            notes.append(f"The last line of the log (line {len(lines) + 1}) is unfinished and was left out.")
    if not events:
        notes.append("The log is empty.")
    starts = [index for index, event in enumerate(events) if event["event"] == "start"]
    if len(starts) > 1:
        notes.append(f"The log holds {len(starts)} runs; this is the last one.")
        events = events[starts[-1] :]

    def last(kind: str) -> Event:
        return next((event for event in reversed(events) if event["event"] == kind), {})

    return Run(
        path=log,
        start=last("start"),
        updates=tuple(event for event in events if event["event"] == "update"),
        validations=tuple(event for event in events if event["event"] == "validation"),
        evidence=last("evidence"),
        finish=last("finish"),
        notes=tuple(notes),
    )


def _log_of(path: Path) -> Path:
    if path.is_dir():
        if not (path / LOG_NAME).is_file():
            raise ConfigError(f"The folder {path} holds no {LOG_NAME}, so it is not a run.", hint=_FROM_A_RUN)
        return path / LOG_NAME
    if not path.exists():
        raise ConfigError(f"There is no run folder {path}.", hint=_FROM_A_RUN)
    return path


def _event(line: bytes, log: Path, where: int) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        shown = one_line(line[:60].decode("utf-8", "replace"))
        raise ConfigError(
            f"Line {where} of {log} is not an event: {shown}{'...' if len(line) > 60 else ''}",
            hint='each line is a JSON object with the key "event"; remove or repair that line.',
        )
    return event
