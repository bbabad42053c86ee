"""Is the update of a user's own step that of the undivided batch, however the batch is cut?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wholebatch.core.batch import LogicalBatch
from wholebatch.engine.pieces import Probe, errors, is_rounding, scale_of_parts
from wholebatch.evidence.cuts import Cut, equal_parts, ragged_parts
from wholebatch.evidence.rehearsal import Rehearsal, Stage

LOUD = 2.0**20
"""What gradients are multiplied by in the ragged window, so that a clip that this batch would not meet acts too."""


class Judge:
    """Says how far a gradient is from that of the undivided batch.

    Args:
        probe: Runs rows, should their gradients cancel.
        whole: The gradient of the undivided batch. Shape ``[entries]``.
        parts: Some cut of the rows.
    """

    def __init__(self, probe: Probe, whole: Tensor, parts: Sequence[Any]) -> None:
        self.probe = probe
        self.whole = whole
        self.tolerance = probe.tolerance
        self._parts = parts
        self._scale: Tensor | None = None

    def errors(self, gradient: Tensor) -> list[float]:
        """Return the relative error of each parameter's gradient."""
        found = errors(gradient, self.whole, self.whole.abs(), self.probe.sizes)
        if is_rounding(found, self.tolerance):
            return found
        if self._scale is None:  # measured again by what the parts hold before they cancel
            self._scale = torch.maximum(scale_of_parts(self.probe, self._parts), self.whole.abs())
        return errors(gradient, self.whole, self._scale, self.probe.sizes)

    def right(self, gradient: Tensor, right: Tensor | None = None) -> bool:
        """Whether a gradient differs by rounding only from the undivided one, or from another."""
        if right is None:
            return is_rounding(self.errors(gradient), self.tolerance)
        return is_rounding(errors(gradient, right, right.abs(), self.probe.sizes), self.tolerance)


@dataclass(frozen=True, slots=True)
class Run:
    """A window that the step has seen.

    Attributes:
        cut: How it was cut.
        found: What the step did.
        loud: What gradients were multiplied by.
        fail_at: At which arrival of a gradient it ran out of memory, on purpose, and went on; None: it did not.
    """

    cut: Cut
    found: Rehearsal
    loud: float = 1.0
    fail_at: int | None = None

    @property
    def gradient(self) -> Tensor:
        """What the optimizer was given, as loud as it would have been. Shape ``[entries]``."""
        return self.found.gradient / self.loud


@dataclass(slots=True)
class Trial:
    """Three windows, judged together.

    Attributes:
        ok: Whether all are right.
        runs: The windows, one for each cut.
        clips: Whether the step clips the gradient of the window.
        window: How many micro-batches make a window as the step itself has it, where it does not take what comes.
        stagnates: Whether gradients are added up in 16 bits.
    """

    ok: bool
    runs: list[Run]
    clips: bool = False
    window: int | None = None
    stagnates: bool = False


def try_step(stage: Stage, judge: Judge, rows: LogicalBatch, cuts: Sequence[Cut], move: Callable[[Any], Any]) -> Trial:
    """Run a step on three windows: by rows, permuted with a lack of memory on the way, and ragged with loud gradients.

    Args:
        stage: Where the step runs.
        judge: Knows the gradient of the undivided batch.
        rows: The batch.
        cuts: Three cuts of it.
        move: Brings a micro-batch to the device.
    """

    def take(cut: Cut) -> list[Any]:
        return [move(rows.take(part)) for part in cut.parts]

    by_rows, permuted, ragged = cuts
    first = stage.run(take(by_rows))
    window = _own_window(stage, first, rows, move)
    if window is not None and window != len(by_rows.parts):
        by_rows = replace(by_rows, parts=equal_parts(rows.rows, window))
        order = [row for part in permuted.parts for row in part]
        permuted = replace(permuted, parts=tuple([order[row] for row in part] for part in by_rows.parts))
        ragged = replace(ragged, parts=ragged_parts(rows.rows, window - 1 if window > 1 else 1))
        first = stage.run(take(by_rows))
    runs = [Run(by_rows, first), _interrupted(stage, permuted, take(permuted), first)]
    sixteen = any(parameter.dtype in (torch.float16,) for parameter in judge.probe.parameters)
    runs.append(_loud(stage, ragged, take, 1.0 if sixteen else LOUD))
    trial = Trial(False, runs, window=window)
    trial.stagnates = any(_summed_in_16_bits(judge, run) for run in runs if run.fail_at is None)
    once = all(len(run.found.steps) == 1 and run.found.schedule_steps <= 1 for run in runs)
    if not once:
        return trial
    if all(judge.right(run.gradient) for run in runs):
        trial.ok = not trial.stagnates
        return trial
    trial.clips = _clipped(stage, judge, runs, take) or _of_the_whole(stage, judge, rows, runs, move)
    trial.ok = trial.clips and not trial.stagnates
    return trial


def _interrupted(stage: Stage, cut: Cut, micro_batches: list[Any], before: Rehearsal) -> Run:
    """Run out of memory in the middle of a backward pass; where that ends the step, run it again without."""
    each = before.arrivals // max(1, before.passes)
    fail_at = each * (before.passes // 2) + each // 2 + 1
    try:
        found = stage.run(micro_batches, fail_at=fail_at)
    except Exception:  # after the planned failure, another one: that is the user's answer to it
        found = None
    if found is not None and found.escaped is None and found.steps:
        return Run(cut, found, fail_at=fail_at if found.failed else None)
    return Run(cut, stage.run(micro_batches))


def _loud(stage: Stage, cut: Cut, take: Callable[[Cut], list[Any]], loud: float) -> Run:
    """Run with loud gradients; where the step refuses those, as it may, without."""
    try:
        found = stage.run(take(cut), loud=loud)
    except Exception:
        found = None
    if found is not None and found.steps:
        return Run(cut, found, loud=loud)
    return Run(cut, stage.run(take(cut)))


def _own_window(stage: Stage, first: Rehearsal, rows: LogicalBatch, move: Callable[[Any], Any]) -> int | None:
    """Return after how many micro-batches the step itself ends a window, where it does not take what comes."""
    steps = first.steps
    if not steps and first.passes and not first.moved:  # it waits for more
        steps = stage.run([move(rows.take([row])) for row in range(rows.rows)]).steps
        return steps[0] if steps and steps[0] > first.passes else None
    return steps[0] if len(steps) > 1 and 1 < steps[0] < first.passes else None


def _clipped(stage: Stage, judge: Judge, runs: Sequence[Run], take: Callable[[Cut], list[Any]]) -> bool:
    """Whether every gradient is the undivided one, clipped as a whole: by its norm, or entry by entry.

    That it is a clip, and no other divisor, shows in other rows that are as loud: they come to the same size.
    """
    *_, last = runs
    if last.loud == 1.0:
        return False
    size, largest = float(last.found.gradient.norm()), float(last.found.gradient.abs().max())

    def by_norm(run: Run) -> bool:
        factor = float(torch.dot(run.found.gradient, judge.whole) / torch.dot(judge.whole, judge.whole))
        norm = float(run.found.gradient.norm())
        if not 0 < factor <= run.loud * (1 + judge.tolerance) or not judge.right(run.found.gradient / factor):
            return False
        return norm <= size * 1.01 and (norm >= size * 0.99 or judge.right(run.gradient))

    def by_value(run: Run) -> bool:
        right = (judge.whole * run.loud).clamp(-largest, largest)
        return judge.right(run.found.gradient, right)

    if not all(map(by_norm, runs)) and not all(map(by_value, runs)):
        return False
    smallest = min(last.cut.parts, key=len)
    smallest = smallest if len(last.cut.parts) > 1 else smallest[: -(-len(smallest) // 2)]
    other = _loud(stage, replace(last.cut, parts=(smallest,)), take, last.loud)
    if other.loud != last.loud:
        return False
    sizes = [(float(other.found.gradient.norm()), size), (float(other.found.gradient.abs().max()), largest)]
    return any(abs(one - another) <= 0.01 * another for one, another in sizes)


def _of_the_whole(
    stage: Stage, judge: Judge, rows: LogicalBatch, runs: Sequence[Run], move: Callable[[Any], Any]
) -> bool:
    """Whether the step makes of the parts what it makes of the whole, and that is more than another divisor."""
    whole = [move(rows.take(range(rows.rows)))]
    for run in runs:
        found = stage.run(whole, loud=run.loud)
        if len(found.steps) != 1 or not judge.right(run.found.gradient, found.gradient):
            return False
    quiet, *_, last = runs
    return last.loud != 1.0 and not judge.right(last.gradient, quiet.gradient)


def _summed_in_16_bits(judge: Judge, run: Run) -> bool:
    """Whether the gradients of 16-bit weights were added up in 16 bits.

    A sum in 32 bits, rounded once, is within half a unit of the last place of what arrived; one that was rounded after
    each addition is not, wherever terms cancel.
    """
    probe, given_all, incoming = judge.probe, run.found.gradient, run.found.incoming
    if judge.tolerance < 0.01 or run.found.passes < 2 or len(run.found.steps) != 1:
        return False
    factor = torch.dot(given_all, incoming) / torch.dot(incoming, incoming).clamp(min=1e-300)
    if not judge.right(given_all, factor * incoming):
        return False
    off = total = 0
    pairs = zip(given_all.split_with_sizes(probe.sizes), incoming.split_with_sizes(probe.sizes), strict=True)
    for parameter, (given, arrived) in zip(probe.parameters, pairs, strict=True):
        if parameter.dtype in (torch.bfloat16, torch.float16):
            unit = torch.finfo(parameter.dtype).eps
            off += int(((given - factor * arrived).abs() > 1.25 * unit * (factor * arrived).abs()).sum())
            total += len(given)
    return total > 0 and off > 0.02 * total
