"""How is a value of the log said to a person? Reads what may be missing or hostile, and writes numbers with units."""

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from wholebatch.core.budget import say_bytes as say_bytes
from wholebatch.core.budget import say_rate as say_rate

Event: TypeAlias = Mapping[str, Any]

# Beyond float32's largest value there is no measurement left to show, and plots overflow on the way there.
_LARGEST = 1e39


def number(event: Event, name: str) -> float | None:
    """Return a finite number of an event, or None for everything else: absent, null, NaN, text.

    Args:
        event: One event of a log.
        name: Its key.

    Example:
        >>> number({"loss": 2, "peak_bytes": None}, "loss"), number({"loss": 2}, "peak_bytes")
        (2.0, None)
    """
    value = event.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _LARGEST else None


def text(event: Event, name: str) -> str:
    """Return a value of an event on one line that no terminal obeys, or "" when it is absent or null.

    Args:
        event: One event of a log.
        name: Its key.

    Example:
        >>> text({"recipe": "two\\nlines\\x1b[2J"}, "recipe")
        'two lines?[2J'
    """
    value = event.get(name)
    return "" if value is None else one_line(str(value))


def one_line(value: str) -> str:
    """Return text with white space as single spaces and every other unprintable character as a question mark."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(value.split()))


def say_count(value: float, thing: str) -> str:
    """Return a count with its noun.

    Example:
        >>> say_count(1, "update"), say_count(12_000, "row")
        ('1 update', '12,000 rows')
    """
    return f"{value:,.0f} {thing}" if value == 1 else f"{value:,.0f} {thing}s"


def say_seconds(value: float) -> str:
    """Return a duration in its two largest units.

    Example:
        >>> say_seconds(3725), say_seconds(84.2), say_seconds(0.5312)
        ('1 h 2 min', '1 min 24 s', '0.53 s')
    """
    if value < 9.95:
        return f"{value:.2g} s"
    whole = math.floor(value + 0.5)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600:,} h {whole % 3600 // 60} min"


def say_share(value: float) -> str:
    """Return a share as a percentage.

    Example:
        >>> say_share(0.0312), say_share(0.718), say_share(0)
        ('3.1 %', '72 %', '0 %')
    """
    percent = 100 * value
    return f"{percent:.2g} %" if abs(percent) < 10 else f"{percent:,.0f} %"
