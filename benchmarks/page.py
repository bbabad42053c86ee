"""How is a benchmark told? The machine it ran on, its tables, its bars, and a dated page for who was not there."""

import argparse
import datetime as dt
import importlib.metadata
import math
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
"""Where ``--write`` puts a page."""


def arguments(description: str, prog: str) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark understands.

    Args:
        description: What the benchmark measures.
        prog: How it is called, such as ``"benchmarks/overhead.py"``.
    """
    parser = argparse.ArgumentParser(
        prog=f"python {prog}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds: shows that it runs, not how fast")
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"write a dated page to {RESULTS.relative_to(Path.cwd())}"
        if RESULTS.is_relative_to(Path.cwd())
        else f"write a dated page to {RESULTS}",
    )
    return parser


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure must reach.

    Attributes:
        name: What is measured.
        value: The figure.
        bound: What it must reach.
        most: Whether the bound is the most that is allowed; else the least.
        digits: Decimals to show; None for scientific notation.
    """

    name: str
    value: float
    bound: float
    most: bool = True
    digits: int | None = 3

    @property
    def met(self) -> bool:
        """Whether the figure reaches its bound. Not a number reaches nothing."""
        return self.value <= self.bound if self.most else self.value >= self.bound

    def row(self) -> list[str]:
        """Return the bar as a row of a table."""
        side = "at most" if self.most else "at least"
        return [self.name, self._number(self.value), f"{side} {self._number(self.bound)}", "yes" if self.met else "NO"]

    def _number(self, value: float) -> str:
        return f"{value:.1e}" if self.digits is None else f"{value:.{self.digits}f}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table that reads well in a terminal and as Markdown; all but the first column are set to the right.

    Args:
        headings: One a column.
        rows: One cell a column.

    Example:
        >>> print(table(["way", "ms"], [["plain", "0.3"]]))
        | way   |  ms |
        | :---- | --: |
        | plain | 0.3 |
    """
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    widths = [max(width, 3) for width in widths]
    lines = [
        list(headings),
        [":" + "-" * (width - 1) if place == 0 else "-" * (width - 1) + ":" for place, width in enumerate(widths)],
        *map(list, rows),
    ]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    )


def bars(found: Sequence[Bar]) -> str:
    """Return the table of bars."""
    return table(["bar", "measured", "must be", "met"], [bar.row() for bar in found])


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return the middle half of some values, as in ``1.012 to 1.034``."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return f"{low:.{digits}f} to {high:.{digits}f}"


def machine(packages: Sequence[str]) -> list[str]:
    """Return what a reader needs to know about the machine, as lines.

    Args:
        packages: Whose versions matter.
    """
    try:
        info = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or "unknown processor"
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return [
        f"{model} ({platform.machine()}), {os.cpu_count()} cores{load}",
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {', '.join(versions)}",
    ]


def tell(
    title: str, name: str, options: argparse.Namespace, packages: Sequence[str], text: str, found: Sequence[Bar]
) -> int:
    """Print a result, write its page if asked to, and return the exit code: 0 if every bar is met, else 1.

    Args:
        title: The heading.
        name: The benchmark's file, without ``.py``.
        options: From the parser; ``write`` and ``quick`` are looked at.
        packages: Whose versions matter.
        text: Tables and what they say.
        found: The bars.
    """
    command = shlex.join(["python", f"benchmarks/{name}.py", *(a for a in sys.argv[1:] if a != "--write")])
    lines = machine(packages)
    today = dt.datetime.now(tz=dt.UTC).date().isoformat()
    missed = [bar.name for bar in found if not bar.met or math.isnan(bar.value)]
    verdict = f"Every bar is met ({len(found)})." if not missed else f"Missed: {'; '.join(missed)}."
    body = f"{text}\n\n{bars(found)}\n\n{verdict}"
    print(f"{title}\n" + "\n".join(lines) + f"\n\n{body}")
    if options.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        page = RESULTS / f"{name}-{today}.md"
        heading = [f"# {title}", "", f"{today}, `{command}`", "", *(f"- {line}" for line in lines)]
        page.write_text("\n".join(heading) + f"\n\n{body}\n")
        print(f"\nwrote {page}", file=sys.stderr)
    return 1 if missed else 0
