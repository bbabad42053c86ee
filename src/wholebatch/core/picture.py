"""How does a plan look? Memory against the micro-batch, kind upon kind, with the budget as a line; SVG by hand."""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from wholebatch.core.budget import say_bytes, say_rows

COLOURS = {
    "weights": "#4c5c74",
    "buffers": "#8a94a6",
    "optimizer state": "#7a5195",
    "gradients": "#b3450f",
    "running sum": "#e08f62",
    "activations": "#1d7f76",
    "data": "#8c6d00",
    "temporary": "#86c0b8",
    "scratch": "#cfa500",
    "other": "#c3c8d1",
}
"""What each kind of memory looks like, from the bottom up."""

THIN = 0.01
"""Kinds that are nowhere more than this share of the largest peak are drawn as one."""

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 76, 190, 14, 44
STEPS = 24


@dataclass(frozen=True, slots=True)
class Picture:
    """What a plan shows.

    Attributes:
        kinds: Returns what is live at the highest moment with so many rows at once, by kind. Unit: bytes.
        most: The most rows that are shown.
        budget: Unit: bytes.
        chosen: The rows that were chosen; None: they vary, as they do where tokens are counted.
        longest: Tokens of each row; 0 where rows have no length.
        measured: What was measured with so many rows, to be marked. Unit: bytes.
    """

    kinds: Callable[[int], Mapping[str, int]]
    most: int
    budget: int
    chosen: int | None = None
    longest: int = 0
    measured: Mapping[int, int] = field(default_factory=dict)

    def svg(self) -> str:
        """Return the picture."""
        sizes = sorted({max(1, round(self.most * step / STEPS)) for step in range(STEPS + 1)} | {self.chosen or 1})
        held = [self.kinds(rows) for rows in sizes]
        peaks = [sum(each.values()) for each in held]
        top = 1.08 * max(*peaks, self.budget if self.budget < 4 * max(peaks) else 0)
        plane = _Plane(sizes[-1], top)
        layers = _layers(held, THIN * max(peaks))
        parts = [*plane.grid()]
        below = [0.0] * len(sizes)
        for kind, heights in layers.items():
            above = [one + two for one, two in zip(below, heights, strict=True)]
            edge = [plane.at(*each) for each in zip(sizes, above, strict=True)]
            edge += [plane.at(*each) for each in reversed(list(zip(sizes, below, strict=True)))]
            parts.append(f'<polygon points="{" ".join(edge)}" fill="{COLOURS[kind]}" fill-opacity="0.85"/>')
            below = above
        if self.budget <= top:
            ends = plane.at(0, self.budget), plane.at(sizes[-1], self.budget)
            parts.append(
                f'<polyline points="{" ".join(ends)}" fill="none" stroke="#c62828" stroke-width="1.5" '
                'stroke-dasharray="6 4"/>'
            )
            parts.append(_text(WIDTH - RIGHT + 6, plane.y(self.budget) + 4, f"budget {say_bytes(self.budget)}"))
        if self.chosen is not None and self.chosen <= sizes[-1]:
            peak = peaks[sizes.index(self.chosen)]
            x, y = plane.x(self.chosen), plane.y(peak)
            parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{plane.y(0):.1f}" stroke="#20252e"/>')
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#20252e"/>')
            end = x > (WIDTH - RIGHT + LEFT) / 2
            said = f"{say_rows(self.chosen)}, {say_bytes(peak)}"
            parts.append(_text(x - 8 if end else x + 8, y - 10, said, anchor="end" if end else "start"))
        parts += [_cross(plane.x(rows), plane.y(size)) for rows, size in self.measured.items() if rows <= sizes[-1]]
        named = [*layers, "measured"] if self.measured else list(layers)
        parts += _legend(named, plane.y(self.budget) if self.budget <= top else None)
        of = f" of {self.longest:,} tokens" if self.longest else ""
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, f"rows{of} in a micro-batch", anchor="middle"))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" role="img" aria-label="memory against the micro-batch"><rect width="100%" '
            f'height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n'
        )


class _Plane:
    """Rows to the right, bytes upwards."""

    def __init__(self, rows: int, size: float) -> None:
        self._rows, self._size = rows, size

    def x(self, rows: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * rows / self._rows

    def y(self, size: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * size / self._size

    def at(self, rows: float, size: float) -> str:
        return f"{self.x(rows):.1f},{self.y(size):.1f}"

    def grid(self) -> list[str]:
        """Lines at round sizes, and numbers on both sides."""
        parts = []
        power = max(0, min(4, math.floor(math.log(self._size, 1024))))
        for size in _ticks(self._size / 1024**power):
            y = self.y(size * 1024**power)
            said = f"{size:,g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}" if size else "0"
            parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#d9dbe0"/>')
            parts.append(_text(LEFT - 6, y + 4, said, anchor="end"))
        whole = [round(rows) for rows in _ticks(self._rows) if rows == round(rows)]
        return parts + [_text(self.x(rows), HEIGHT - BOTTOM + 16, f"{rows:,}", anchor="middle") for rows in whole]


def _ticks(top: float) -> list[float]:
    """Round numbers from 0 to a top, some three to six of them."""
    rough = top / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= rough * 0.999)
    return [step * place for place in range(int(top / step + 1e-9) + 1)]


def _layers(held: Sequence[Mapping[str, int]], thin: float) -> dict[str, list[float]]:
    """The height of each kind at each size, from the bottom up; thin ones together."""
    layers: dict[str, list[float]] = {}
    other = [0.0] * len(held)
    for kind in COLOURS:
        heights = [float(each.get(kind, 0)) for each in held]
        if max(heights) >= thin:
            layers[kind] = heights
        else:
            other = [one + two for one, two in zip(other, heights, strict=True)]
    return {**layers, "other": other} if max(other) > 0 else layers


def _legend(kinds: Sequence[str], taken: float | None) -> list[str]:
    """Names of the kinds at the right, in the order of the layers, clear of the name of the budget."""
    parts = []
    y = TOP + 12.0
    for kind in reversed(kinds):
        if taken is not None and abs(y - taken) < 16:
            y = taken + 20
        if kind in COLOURS:
            parts.append(
                f'<rect x="{WIDTH - RIGHT + 8}" y="{y - 9:.1f}" width="10" height="10" fill="{COLOURS[kind]}" '
                'fill-opacity="0.85"/>'
            )
        else:
            parts.append(_cross(WIDTH - RIGHT + 13, y - 4))
        parts.append(_text(WIDTH - RIGHT + 24, y, kind))
        y += 19
    return parts


def _cross(x: float, y: float) -> str:
    return (
        f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8" fill="none" stroke="#20252e" stroke-width="1.6" '
        'class="measured"/>'
    )


def _text(x: float, y: float, said: str, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" font-family="sans-serif" fill="#3d4250" '
        f'text-anchor="{anchor}" paint-order="stroke" stroke="#ffffff" stroke-width="3">{html.escape(said)}</text>'
    )
