"""How do several runs look in one plot? A curve for each, told apart by colour and by dashes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wholebatch.evidence.drawing import COLOURS, ROUND, drawing
from wholebatch.evidence.figures import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROLES = ("series", "accent", "third", "fourth", "fifth", "sixth")
_DASHES = ("-", "--", "-.", ":")
_LABEL = 24
"""A longer name is shortened in the legend. Unit: characters."""


@dataclass(frozen=True, slots=True)
class Curve:
    """What one run shows.

    Attributes:
        name: Of the run.
        points: Update and value, in order.
        marks: Whether each point is marked, as where there are few.
    """

    name: str
    points: Sequence[tuple[float, float]]
    marks: bool = False


def curves(title: str, caption: str, shown: Sequence[Curve]) -> Figure | None:
    """Return one plot with a curve for each run, or None where no run has a value.

    Args:
        title: What it shows.
        caption: What to look for.
        shown: In the order of the legend; a run without a value keeps its colour, and is left out.
    """
    if not any(curve.points for curve in shown):
        return None
    ends = [f"{curve.name} {curve.points[-1][1]:.4g}" for curve in shown if curve.points]

    def fill(axes: "Axes") -> None:
        for place, curve in enumerate(shown):
            if curve.points:
                across, up = zip(*curve.points, strict=True)
                axes.plot(
                    across,
                    up,
                    color=COLOURS[_ROLES[place % len(_ROLES)]],
                    linestyle=_DASHES[place % len(_DASHES)],
                    linewidth=1.6,
                    marker="." if curve.marks else "",
                    markersize=6,
                    label=_short(curve.name),
                )
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, columnspacing=1.2, handlelength=2.4)
        axes.set_xlabel("update", loc="right")
        _scale(axes)

    return Figure(
        title, f"{caption} At the end: {', '.join(ends)}.", drawing(title, f"{title}: {', '.join(ends)}.", fill)
    )


def _short(name: str) -> str:
    name = name if len(name) <= _LABEL else f"...{name[-_LABEL + 3 :]}"
    # matplotlib takes dollars for mathematics, and leaves labels that begin with an underscore out of a legend
    return name.replace("$", r"\$").lstrip("_") or "run"


def _scale(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=ROUND))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.6g}"))
