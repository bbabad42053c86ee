"""How does a plot get into a page? As inline SVG, whose colours and font follow the page, the same bytes each time."""

import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING

from wholebatch.core.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Each role has a colour of its own, which the SVG hands to the style sheet: the page decides in the dark and in print.
COLOURS = {
    "ink": "#3d4250",
    "rule": "#d9dbe0",
    "series": "#1d5fa6",
    "accent": "#b3450f",
    "calm": "#6d7280",
    "third": "#1f7a4d",
    "fourth": "#8a3f9e",
    "fifth": "#8c6d00",
    "sixth": "#0f7f8f",
}
# About as wide as a phone, so that text stays legible there; wider screens show two in a row.
_INCHES = (372 / 72, 228 / 72)
ROUND = (1, 2, 2.5, 5, 10)  # steps between ticks that read well


def require_matplotlib() -> None:
    """Raise a `MissingExtraError` where matplotlib is not installed."""
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "The plots of a report need matplotlib, which is not installed.",
            hint="pip install 'wholebatch[plots]', then write the report with `wholebatch report RUN`.",
        ) from error


def drawing(title: str, said: str, fill: Callable[["Axes"], None]) -> str:
    """Return one plot as an ``<svg>`` element. matplotlib's global state is left alone.

    Args:
        title: Of the plot; two plots of one page differ in it.
        said: What a screen reader says.
        fill: Draws into the axes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    with mpl.rc_context():
        _set_style(salt=title)
        canvas = Canvas(figsize=_INCHES, layout="constrained")
        fill(canvas.add_subplot())
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True)
    return _inline(buffer.getvalue(), said)


def _set_style(salt: str) -> None:
    import matplotlib as mpl

    mpl.rcdefaults()  # the user's own style would make the report depend on the machine
    mpl.rcParams.update(
        {
            "svg.hashsalt": salt,
            "svg.fonttype": "none",  # text stays text: small, selectable, in the font of the page
            "font.size": 11,
            "text.color": COLOURS["ink"],
            "axes.labelcolor": COLOURS["ink"],
            "axes.edgecolor": COLOURS["calm"],
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "axes.unicode_minus": False,
            "grid.color": COLOURS["rule"],
            "grid.linewidth": 0.8,
            "xtick.color": COLOURS["ink"],
            "ytick.color": COLOURS["ink"],
            "ytick.major.size": 0,
            "legend.frameon": False,
            "legend.fontsize": 10.5,
        }
    )


def _inline(svg: str, said: str) -> str:
    """Return the bare element of a drawing: no prologue, no metadata, no rule that reaches out into the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"| transform="rotate\(-0 [^"]*"', "", svg)  # numbered names repeat from plot to plot
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", svg)
    for role, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{role}, {colour})")
    svg = re.sub(r"\n\s*", "\n", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(said)}" ', 1).strip()
