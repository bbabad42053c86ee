"""What does the person at the terminal see while a run goes on?"""

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from wholebatch.core.errors import MissingExtraError
from wholebatch.core.record import Update
from wholebatch.evidence.sinks.seam import as_event
from wholebatch.evidence.wording import Event, number, one_line, say_bytes, say_rate, say_seconds, text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

# Speed is that of the last few windows: steady enough to read, and quick to follow a change.
_RECENT_WINDOWS = 10
_REDRAW_SECONDS = 0.1
_SKIPS_SAID = 3
_WIDE_ENOUGH_FOR_A_BAR = 96


class ProgressBar:
    """A sink that shows how far a run is: epoch, update of those planned, loss, targets per second, memory, time left.

    On a terminal it is one line that is drawn anew. Where the output is a file or a pipe, it is a short line for the
    first update, then one now and then, and nothing that moves a cursor.

    Args:
        console: A ``rich.console.Console``; None: one on stderr.
        every_seconds: Where the output is no terminal, the time between two lines. Unit: seconds.
        clock: Says the time. Unit: seconds.

    Raises:
        MissingExtraError: Rich is not installed.

    Example:
        >>> import sys
        >>> from rich.console import Console
        >>> bar = ProgressBar(console=Console(file=sys.stdout, width=100), clock=lambda: 0.0)
        >>> bar.write({"event": "start", "updates_planned": 40})
        >>> bar.write({"event": "update", "number": 1, "epoch": 1, "loss": 5.5, "targets": 900, "seconds": 0.5})
        epoch 1, update 1/40, loss 5.5, 1,800 targets/s
        >>> bar.close()
    """

    def __init__(
        self,
        *,
        console: "Console | None" = None,
        every_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        try:
            from rich.console import Console
        except ImportError as error:
            raise MissingExtraError(
                "The progress bar needs Rich, which is not installed.",
                hint="pip install 'wholebatch[cli]', or train without the progress bar.",
            ) from error
        self._console = console or Console(stderr=True)
        self._redraws = self._console.is_terminal and not self._console.is_dumb_terminal
        self._every_seconds = every_seconds
        self._clock = clock
        self._began = clock()
        self._planned: float | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT_WINDOWS)
        self._windows = 0
        self._skipped = 0
        self._last_shown: float | None = None
        self._unsaid: str | None = None  # a plain line that was not due yet
        self._live: tuple[Progress, TaskID] | None = None

    def write(self, event: Event | Update) -> None:
        """Show one event."""
        event = as_event(event)
        match event.get("event"):
            case "start":
                self._began = self._clock()
                self._planned = number(event, "updates_planned")
            case "update":
                self._update(event)
            case "validation":
                measures = event.get("measures") or {}
                said = ", ".join(f"{one_line(str(name))} {_say(number(measures, name))}" for name in measures)
                self._print(f"epoch {text(event, 'epoch')}, validation: {said}")
            case "finish":
                self.close()

    def close(self) -> None:
        """Leave the last state on the screen and give the terminal back."""
        if self._live is not None:
            self._live[0].stop()
            self._live = None
        if self._unsaid is not None:
            self._print(self._unsaid)
            self._unsaid = None

    def _update(self, event: Event) -> None:
        self._windows += 1
        if event.get("skipped"):
            self._skipped += 1
            if self._skipped <= _SKIPS_SAID:
                last = " (the log has the reasons of further ones)" if self._skipped == _SKIPS_SAID else ""
                self._print(f"update {text(event, 'number')} skipped{last}: {text(event, 'skipped')}")
        targets, seconds = number(event, "targets"), number(event, "seconds")
        if targets is not None and seconds:
            self._recent.append((targets, seconds))
        now = self._clock()
        if self._redraws:
            self._draw(event, now)
            return
        self._unsaid = ", ".join(self._words(event, now))
        if self._last_shown is None or now - self._last_shown >= self._every_seconds:
            self._print(self._unsaid)
            self._unsaid = None
            self._last_shown = now

    def _words(self, event: Event, now: float) -> list[str]:
        words = [f"epoch {text(event, 'epoch')}"] if event.get("epoch") is not None else []
        words += [f"update {self._windows}{f'/{self._planned:.0f}' if self._planned else ''}"]
        words += [f"loss {_say(number(event, 'loss'))}"]
        if self._recent:
            rate = sum(targets for targets, _ in self._recent) / sum(seconds for _, seconds in self._recent)
            words += [f"{say_rate(rate)} targets/s"]
        peak_bytes = number(event, "peak_bytes")
        if peak_bytes is not None:
            words += [say_bytes(peak_bytes)]
        if self._skipped:
            words += [f"{self._skipped} skipped"]
        if self._planned and now > self._began:
            left = (now - self._began) / self._windows * max(0.0, self._planned - self._windows)
            words += [f"{say_seconds(left)} left"]
        return words

    def _draw(self, event: Event, now: float) -> None:
        if self._live is None:
            self._live = self._start()
        progress, task = self._live
        progress.update(task, completed=self._windows, words="  ".join(self._words(event, now)))
        done = self._planned is not None and self._windows >= self._planned
        if done or self._last_shown is None or now - self._last_shown >= _REDRAW_SECONDS:
            progress.refresh()
            self._last_shown = now

    def _start(self) -> "tuple[Progress, TaskID]":
        from rich.progress import BarColumn, Progress, TextColumn

        words = TextColumn("{task.fields[words]}", markup=False)
        progress = Progress(
            *([BarColumn(bar_width=16), words] if self._console.width >= _WIDE_ENOUGH_FOR_A_BAR else [words]),
            console=self._console,
            auto_refresh=False,  # no thread beside the training: drawn when there is something new
            redirect_stdout=False,  # data on stdout stays there
        )
        task = progress.add_task("", total=self._planned, words="")
        progress.start()
        return progress, task

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)


def _say(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4g}"
