"""How much memory is that? Sizes as they are written and said, such as "8GiB"."""

import math
import re
from numbers import Integral

from wholebatch.core.errors import ConfigError

_UNITS = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "ki": 1024,
    "mi": 1024**2,
    "gi": 1024**3,
    "ti": 1024**4,
}
NUMBER = r"(?P<number>(?:\d{1,3}(?:,\d{3})+|\d[\d_]*)(?:\.\d+)?|\.\d+)"
"""A number as it is written. A comma stands between thousands and nowhere else, where it may be meant for a point."""

_SIZE = re.compile(rf"\s*{NUMBER}\s*(?P<unit>(?:[kmgt]i?)?)b(?:ytes?)?\s*", re.IGNORECASE)


def parse_bytes(said: object, name: str = "memory") -> int:
    """Return the number of bytes that a size stands for.

    Args:
        said: A whole number of bytes, or a text with a unit: ``"8GiB"`` and ``"500 MB"`` are powers of 1024 and of
            1000.
        name: What it is called where it was said; errors say it.

    Returns:
        At least 1. Unit: bytes.

    Raises:
        ConfigError: It is no size, has no unit, or is less than one byte.

    Example:
        >>> parse_bytes("8GiB"), parse_bytes("500 MB"), parse_bytes("0.5 gib"), parse_bytes(4096)
        (8589934592, 500000000, 536870912, 4096)
    """
    if not isinstance(said, bool) and isinstance(said, Integral):
        size: float = int(said)
    else:
        found = _SIZE.fullmatch(said) if isinstance(said, str) else None
        if found is None:
            bare = isinstance(said, str) and re.fullmatch(r"\s*[\d_,.]+\s*[kmgt]?i?\s*", said, re.IGNORECASE)
            raise ConfigError(
                f"{name}={said!r} is not a size." if not bare else f"{name}={said!r} has no unit.",
                hint=f'write a number with a unit, as in {name}="8GiB" or "500MB", or a whole number of bytes.',
            )
        size = float(re.sub("[_,]", "", found["number"])) * _UNITS[found["unit"].lower()]
    if size < 1:
        raise ConfigError(
            f"{name}={said!r} holds nothing.", hint=f'pass what there is, as in {name}="8GiB", or None to find out.'
        )
    return math.floor(size)


def say_bytes(value: float) -> str:
    """Return a size in the binary unit that fits it.

    Example:
        >>> say_bytes(1_300_000_000), say_bytes(12)
        ('1.21 GiB', '12 B')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:,.3g} TiB" if abs(value) < 1000 else f"{value:,.0f} TiB"


def say_rows(rows: int) -> str:
    """Return a number of rows in words.

    Example:
        >>> say_rows(1), say_rows(1200)
        ('1 row', '1,200 rows')
    """
    return f"{rows:,} row" if rows == 1 else f"{rows:,} rows"


def say_rate(value: float) -> str:
    """Return a speed to three digits.

    Example:
        >>> say_rate(15_234.5), say_rate(0.51234)
        ('15,200', '0.512')
    """
    return f"{float(f'{value:.3g}'):,.0f}" if abs(value) >= 100 else f"{value:.3g}"
