"""What does a run look like? Its plots over the updates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from wholebatch.evidence.drawing import COLOURS, ROUND, drawing, require_matplotlib
from wholebatch.evidence.runlog import Run
from wholebatch.evidence.wording import number, say_bytes, say_rate, say_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DASHES = (("--", "Dashed"), (":", "Dotted"))
_MARKED_UP_TO = 80  # updates: beyond, a mark at each would hide the line


@dataclass(frozen=True, slots=True)
class Figure:
    """One plot.

    Attributes:
        title: What it shows, with the unit.
        caption: What to look for.
        svg: An ``<svg>`` element that names itself to screen readers and scales with the page.
    """

    title: str
    caption: str
    svg: str


@dataclass(frozen=True, slots=True)
class _Line:
    """A horizontal line to compare with."""

    value: float
    label: str
    said: str
    role: str


def figures(run: Run) -> list[Figure]:
    """Return the plots of a run: loss, memory, speed, padding, gradient norm, learning rate, noise scale.

    What was never measured has no plot. The same run gives the same bytes, and matplotlib's global state is left alone.

    Args:
        run: A log that was read.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_matplotlib()
    drawn = [_loss(run), _memory(run), _speed(run), _padding(run), _grad_norm(run), _lr(run), _noise_scale(run)]
    return [figure for figure in drawn if figure is not None]


def _loss(run: Run) -> Figure | None:
    validation = [
        (number(event, "update"), number(event["measures"], "loss"))
        for event in run.validations
        if isinstance(event.get("measures"), dict)
    ]
    points = [(update, loss) for update, loss in validation if update is not None and loss is not None]
    caption = "Loss of each logical batch" + (", and on the validation rows." if points else ".")
    return _figure(run, "Loss", caption, run.series("loss"), points=points, marks=True)


def _memory(run: Run) -> Figure | None:
    peaks = run.series("peak_bytes")
    whole, budget = number(run.evidence, "undivided_peak_bytes"), number(run.start, "budget_bytes")
    known = [peak for peak in peaks if not math.isnan(peak)] + [line for line in (whole, budget) if line]
    if not known:
        return None
    power = min(3, int(math.log(max(*known, 1), 1024) + 0.01))
    scale, unit = 1024**power, ("B", "KiB", "MiB", "GiB")[power]
    lines = [_Line(whole / scale, "undivided batch", say_bytes(whole), "calm")] if whole else []
    lines += [_Line(budget / scale, "budget", say_bytes(budget), "accent")] if budget else []
    return _figure(
        run,
        f"Peak memory, {unit}",
        "Highest memory use within each update.",
        [peak / scale for peak in peaks],
        lines=lines,
        from_zero=True,
    )


def _speed(run: Run) -> Figure | None:
    rates = [
        targets / seconds if seconds > 0 else math.nan
        for targets, seconds in zip(run.series("targets"), run.series("seconds"), strict=True)
    ]
    known = [rate for rate in rates if not math.isnan(rate)]
    ours, plain = number(run.evidence, "targets_per_second"), number(run.evidence, "plain_targets_per_second")
    lines = []
    if ours and plain and known:
        # The two were measured side by side, in another second than the updates: it is their ratio that carries over.
        value = median(known) * plain / ours
        lines = [_Line(value, "plain loop", f"{say_rate(value)} by the ratio measured side by side", "calm")]
    return _figure(run, "Targets per second", "Speed of each update.", rates, lines=lines, from_zero=True)


def _padding(run: Run) -> Figure | None:
    percent = [100 * share for share in run.series("padding")]
    known = [share for share in run.series("padding") if not math.isnan(share)]
    mean = f" {say_share(sum(known) / len(known))} on average." if known else ""
    caption = f"Positions that hold padding instead of a token.{mean}"
    return _figure(run, "Padding, % of all positions", caption, percent, from_zero=True)


def _grad_norm(run: Run) -> Figure | None:
    norms = run.series("grad_norm")
    positive = [norm for norm in norms if norm > 0]
    wide = bool(positive) and max(positive) > 50 * min(positive)
    caption = "2-norm of the gradient of each logical batch, before clipping."
    return _figure(run, "Gradient norm", caption, norms, logarithmic=wide, from_zero=not wide)


def _lr(run: Run) -> Figure | None:
    caption = "Learning rate of the optimizer's first group."
    return _figure(run, "Learning rate", caption, run.series("lr"), from_zero=True)


def _noise_scale(run: Run) -> Figure | None:
    scales = run.series("noise_scale")
    positive = [scale for scale in scales if scale > 0]
    wide = bool(positive) and max(positive) > 50 * min(positive)
    caption = "Gradient noise scale in targets: a logical batch of so many wastes half of them, a smaller one less."
    return _figure(run, "Noise scale, targets", caption, scales, logarithmic=wide, from_zero=not wide)


def _figure(
    run: Run,
    title: str,
    caption: str,
    values: Sequence[float],
    *,
    points: Sequence[tuple[float, float]] = (),
    lines: Sequence[_Line] = (),
    marks: bool = False,
    from_zero: bool = False,
    logarithmic: bool = False,
) -> Figure | None:
    """Return one plot over the updates, or None when there is no value to show."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return None
    said = f"{title}: {len(known)} updates, from {known[0]:.4g} to {known[-1]:.4g}"
    said += f", lowest {min(known):.4g}, highest {max(known):.4g}."
    dashed = zip(lines, _DASHES, strict=False)
    caption += "".join(f" {pattern}: {line.label}, {line.said}." for line, (_, pattern) in dashed)
    said += f" {len(points)} validation points, the last {points[-1][1]:.4g}." if points else ""

    def fill(axes: "Axes") -> None:
        _draw(axes, run, values, points=points, lines=lines, marks=marks)
        _scale(axes, known, lines, from_zero=from_zero, logarithmic=logarithmic)

    return Figure(title, caption, drawing(title, said, fill))


def _draw(
    axes: "Axes",
    run: Run,
    values: Sequence[float],
    *,
    points: Sequence[tuple[float, float]],
    lines: Sequence[_Line],
    marks: bool,
) -> None:
    numbers = [number(update, "number") or index for index, update in enumerate(run.updates, 1)]
    marker = "." if len(numbers) <= _MARKED_UP_TO else ""
    axes.plot(numbers, values, color=COLOURS["series"], linewidth=1.6, marker=marker, markersize=4, label="each update")
    if points:
        across, up = zip(*points, strict=True)
        axes.plot(across, up, "D", color=COLOURS["accent"], markersize=5.5, label="validation")
    for line, (dashes, _) in zip(lines, _DASHES, strict=False):
        axes.axhline(line.value, color=COLOURS[line.role], linewidth=1.6, linestyle=dashes, label=line.label)
    skipped = [at for at, update in zip(numbers, run.updates, strict=True) if marks and update.get("skipped")]
    if skipped:
        foot = axes.get_xaxis_transform()  # across: updates; up: the height of the plot
        low = [0.03] * len(skipped)
        axes.plot(skipped, low, "x", color=COLOURS["accent"], transform=foot, markersize=5, label="skipped")
    if points or lines or skipped:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, columnspacing=1.2, handlelength=1.6)
    axes.set_xlabel("update", loc="right")


def _scale(axes: "Axes", known: Sequence[float], lines: Sequence[_Line], *, from_zero: bool, logarithmic: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.0f}"))
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=ROUND))
        if from_zero and min(known) >= 0:
            axes.set_ylim(bottom=0, top=1.08 * max(*known, *(line.value for line in lines), 0) or 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.6g}"))
