"""How long does a message take between ranks? Bandwidth and latency, as they are written and as arithmetic."""

import math
import re
from dataclasses import dataclass

from wholebatch.core.budget import NUMBER
from wholebatch.core.errors import ConfigError

_POWERS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BANDWIDTH = re.compile(
    rf"\s*{NUMBER}\s*(?P<unit>[kmgt]?)(?P<binary>i?)(?P<what>b|byte|bytes|bit|bits)"
    r"\s*(?:/\s*s(?:ec|econd)?|ps)\s*",
    re.IGNORECASE,
)
_LATENCY = re.compile(rf"\s*{NUMBER}\s*(?P<unit>us|ms|s)\s*", re.IGNORECASE)
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_bandwidth(said: object) -> float:
    """Return what a bandwidth stands for.

    Args:
        said: A number of bytes a second, or a text: ``"25GB/s"`` and ``"3 GiB/s"`` count bytes, ``"100Gbit/s"`` and
            ``"100Gb/s"`` bits, of which eight make a byte. A small ``b`` is a bit, as on the label of a network card.

    Returns:
        More than 0. Unit: bytes a second.

    Raises:
        ConfigError: It is no bandwidth.

    Example:
        >>> parse_bandwidth("25GB/s"), parse_bandwidth("100 Gbit/s"), parse_bandwidth("1Gbps")
        (25000000000.0, 12500000000.0, 125000000.0)
    """
    bandwidth = float(said) if isinstance(said, int | float) and not isinstance(said, bool) else math.nan
    found = _BANDWIDTH.fullmatch(said) if isinstance(said, str) else None
    if found is not None:
        power = _POWERS[found["unit"].lower()]
        if found["binary"]:
            power = 1024 ** round(math.log(power, 1000))
        bits = found["what"] == "b" or found["what"].lower().startswith("bit")
        bandwidth = float(re.sub("[_,]", "", found["number"])) * power / (8 if bits else 1)
    if not (0 < bandwidth < math.inf):
        raise ConfigError(
            f"bandwidth={said!r} is not a bandwidth.",
            hint='write what one rank sends in a second, as in "25GB/s" (bytes) or "100Gbit/s" (bits).',
        )
    return bandwidth


def parse_latency(said: object) -> float:
    """Return what a latency stands for.

    Args:
        said: A number of seconds, or a text with a unit: ``"20us"``, ``"1 ms"``, ``"0.5 s"``.

    Returns:
        0 or more. Unit: seconds.

    Raises:
        ConfigError: It is no latency.

    Example:
        >>> parse_latency("1 ms"), parse_latency(0.02)
        (0.001, 0.02)
    """
    latency = float(said) if isinstance(said, int | float) and not isinstance(said, bool) else math.nan
    found = _LATENCY.fullmatch(said) if isinstance(said, str) else None
    if found is not None:
        latency = float(re.sub("[_,]", "", found["number"])) * _SECONDS[found["unit"].lower()]
    if not (0 <= latency < math.inf):
        raise ConfigError(
            f"latency={said!r} is not a latency.",
            hint='write how long a small message takes from rank to rank, as in "20us" or "1ms".',
        )
    return latency


@dataclass(frozen=True, slots=True)
class Link:
    """What connects ranks, and how long collectives take over it.

    In a ring each of n ranks sends 1/n of the data to its neighbour, n - 1 times to add up and n - 1 times to hand
    round what came of it. So every rank sends 2 (n - 1) / n of the data, nearly twice, whatever n is.

    Attributes:
        bandwidth: What one rank sends in a second, while it receives as much. Unit: bytes a second.
        latency: How long an empty message takes from one rank to the next. Unit: seconds.

    Example:
        >>> link = Link(1e9, 1e-3)
        >>> link.all_reduce(8_000_000, ranks=2), link.all_reduce(8_000_000, ranks=1)
        (0.01, 0.0)
    """

    bandwidth: float
    latency: float = 0.0

    def all_reduce(self, size: float, ranks: int) -> float:
        """Return the time until every rank has the sum of what all have. Unit: seconds.

        Args:
            size: What each rank has. Unit: bytes.
            ranks: How many there are.
        """
        return 2 * self.one_way(size, ranks)

    def one_way(self, size: float, ranks: int) -> float:
        """Return the time of one half: all-gather, or reduce-scatter. Unit: seconds.

        Args:
            size: What the ranks have together (all-gather), or each of them (reduce-scatter). Unit: bytes.
            ranks: How many there are.
        """
        return (ranks - 1) * (size / ranks / self.bandwidth + self.latency)


def say_seconds(seconds: float) -> str:
    """Return a time in the unit that fits it.

    Example:
        >>> say_seconds(0.0123), say_seconds(2e-5), say_seconds(0), say_seconds(75)
        ('12.3 ms', '20 us', '0 s', '75 s')
    """
    if seconds == 0 or seconds >= 1:
        return f"{seconds:,.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def say_bandwidth(bandwidth: float) -> str:
    """Return a bandwidth in the unit that fits it.

    Example:
        >>> say_bandwidth(25e9), say_bandwidth(12.5e6)
        ('25 GB/s', '12.5 MB/s')
    """
    for unit in ("B/s", "kB/s", "MB/s"):
        if bandwidth < 1000:
            return f"{bandwidth:.3g} {unit}"
        bandwidth /= 1000
    return f"{bandwidth:,.3g} GB/s"
