"""How do several runs compare? Their logs as one page, side by side, and as a table for the terminal."""

import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from wholebatch.core.errors import ConfigError
from wholebatch.evidence.curves import Curve, curves
from wholebatch.evidence.drawing import require_matplotlib
from wholebatch.evidence.figures import Figure
from wholebatch.evidence.page import as_html, html_page, plots, table, write_page
from wholebatch.evidence.runlog import Run, read_log
from wholebatch.evidence.wording import number, one_line, say_bytes, say_count, say_seconds, text

COMPARISON_NAME = "comparison.html"
_NOT_COMPARED = frozenset({"out", "sink", "compare"})
_SMOOTH = 24
"""A curve of the loss is a mean over the last one of so many parts of its updates."""


def write_comparison(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write a page that shows several runs side by side, from their logs alone.

    Args:
        runs: Run folders, or the logs in them; at least two.
        out: The page; left out, ``comparison.html`` in the folder that holds them all.

    Returns:
        The page.

    Raises:
        ConfigError: There are fewer than two, one is given twice or is no run, or the page cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    named = _named(runs)
    page = Path(out) if out is not None else _common_folder(named) / COMPARISON_NAME
    if page.is_dir() or not page.parent.is_dir():
        raise ConfigError(f"`--out` is {str(page)!r}, where no file can be written.", hint="name a file in a folder.")
    require_matplotlib()
    head, rows = _cells(named)
    main = [*table("Runs", head, rows, named=True), *plots(_figures(named), "Side by side")]
    sources = ", ".join(escape(str(run.path)) for run in named.values())
    return write_page(page, html_page(_title(named), _opening(named), main, f"Made from {sources}."))


def summarize_runs(runs: Sequence[str | Path]) -> str:
    """Return a table of several runs, as text for the terminal; arguments and errors are those of `write_comparison`.

    Example:
        >>> for name in ("a", "b"):
        ...     Path(name).mkdir()
        ...     event = '{"event": "update", "number": 1, "loss": 2.5, "peak_bytes": 2048}'
        ...     _ = Path(name, "log.jsonl").write_text(event + chr(10))
        >>> print(summarize_runs(["a", "b"]))
        Run  Updates  Training loss  Peak memory
        a          1            2.5        2 KiB
        b          1            2.5        2 KiB
    """
    head, rows = _cells(_named(runs))
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    )


def _named(runs: Sequence[str | Path]) -> dict[str, Run]:
    """Return the runs by the names of their folders, or by their paths where two folders have one name."""
    if len(runs) < 2:
        raise ConfigError("One run alone cannot be compared.", hint="name several, as in runs/first runs/second.")
    read = [read_log(run) for run in runs]
    folders = [run.path.resolve().parent for run in read]
    for place, folder in enumerate(folders):
        if folder in folders[:place]:
            raise ConfigError(f"The run {runs[place]} is given twice.", hint="name each run once.")
    short = [one_line(folder.name) for folder in folders]
    unique = len(set(short)) == len(short)
    names = short if unique else [one_line(str(run.path.parent)) for run in read]
    return dict(zip(names, read, strict=True))


def _common_folder(named: Mapping[str, Run]) -> Path:
    folders = [run.path.parent for run in named.values()]
    if len({folder.is_absolute() for folder in folders}) > 1:
        folders = [folder.resolve() for folder in folders]
    try:
        return Path(os.path.commonpath([folder.parent if folder.name else folder for folder in folders]) or ".")
    except ValueError:  # on different drives
        return Path()


def _title(named: Mapping[str, Run]) -> str:
    recipes = {text(run.start, "recipe") for run in named.values()} - {""}
    return f"{len(named)} training runs" + (f": {recipes.pop()}" if len(recipes) == 1 else "")


def _opening(named: Mapping[str, Run]) -> list[str]:
    differ = [_spoken(key).lower() for key in _differing(named)]
    said = f"They differ in {', '.join(differ)}." if differ else "They were asked for in the same words."
    lines = [f'<p class="lede">{as_html(said)}</p>']
    unfinished = [f"{name} ({run.status})" for name, run in named.items() if run.status != "done"]
    if unfinished:
        lines.append(f'<p class="warn">{as_html("Not every run is done: " + ", ".join(unfinished) + ".")}</p>')
    return lines


def _differing(named: Mapping[str, Run]) -> list[str]:
    """Return the keys of the configuration in which the runs differ."""
    stated = [_config(run) for run in named.values()]
    keys = dict.fromkeys(key for config in stated for key in config if key not in _NOT_COMPARED)
    return [key for key in keys if len({text(config, key) for config in stated}) > 1]


def _config(run: Run) -> Mapping[str, Any]:
    config = run.start.get("config")
    return config if isinstance(config, Mapping) else {}


def _measures(named: Mapping[str, Run]) -> list[str]:
    told = [measures for run in named.values() for _, measures in _validations(run)]
    return list(dict.fromkeys(name for measures in told for name in measures))


def _validations(run: Run) -> list[tuple[float, Mapping[str, Any]]]:
    found = []
    for event in run.validations:
        update, measures = number(event, "update"), event.get("measures")
        if update is not None and isinstance(measures, Mapping):
            found.append((update, measures))
    return found


def _cells(named: Mapping[str, Run]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of a table; a column in which nothing is known is left out."""
    differ, measures = _differing(named), _measures(named)
    head = ["Run", *map(_spoken, differ), "Updates", "Training loss"]
    head += [f"Validation {_spoken(name).lower()}" for name in measures]
    head += ["Peak memory", "Gradient off by", "Time"]
    rows = [[name, *_row(run, differ, measures)] for name, run in named.items()]
    kept = [place for place in range(len(head)) if any(row[place] != "-" for row in rows)]
    return [head[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _row(run: Run, differ: Sequence[str], measures: Sequence[str]) -> list[str]:
    losses = [loss for loss in run.series("loss") if not math.isnan(loss)]
    last = _validations(run)[-1][1] if _validations(run) else {}
    peaks = [peak for peak in run.series("peak_bytes") if not math.isnan(peak)]
    error, seconds = number(run.evidence, "gradient_error"), number(run.finish, "seconds")
    applied = sum(not update.get("skipped") for update in run.updates)
    values = [number(last, name) for name in measures]
    return [
        *(text(_config(run), key) or "-" for key in differ),
        f"{applied:,}",
        f"{fmean(losses[-_window(len(losses)) :]):.4g}" if losses else "-",
        *("-" if value is None else f"{value:.4g}" for value in values),
        say_bytes(max(peaks)) if peaks else "-",
        f"{error:.1e}" if error is not None else "-",
        say_seconds(seconds) if seconds is not None else "-",
    ]


def _spoken(key: str) -> str:
    words = one_line(key).replace("_", " ")
    return words[:1].upper() + words[1:]


def _window(updates: int) -> int:
    return max(1, updates // _SMOOTH)


def _figures(named: Mapping[str, Run]) -> list[Figure]:
    window = _window(max(len(run.updates) for run in named.values()))
    smooth = f", a mean over {say_count(window, 'update')}" if window > 1 else ""
    found = [curves("Training loss", f"Loss of each logical batch{smooth}.", _losses(named, window))]
    for name in _measures(named):
        points = {
            run: [
                (update, value)
                for update, measures in _validations(log)
                if (value := number(measures, name)) is not None
            ]
            for run, log in named.items()
        }
        shown = [Curve(run, each, marks=True) for run, each in points.items()]
        found.append(curves(f"Validation {_spoken(name).lower()}", "On rows that no run has trained on.", shown))
    return [figure for figure in found if figure is not None]


def _losses(named: Mapping[str, Run], window: int) -> list[Curve]:
    shown = []
    for name, run in named.items():
        points: list[tuple[float, float]] = []
        recent: list[float] = []
        for place, (update, loss) in enumerate(zip(run.updates, run.series("loss"), strict=True), 1):
            if not math.isnan(loss):
                recent = [*recent, loss][-window:]
                points.append((number(update, "number") or place, fmean(recent)))
        shown.append(Curve(name, points))
    return shown
