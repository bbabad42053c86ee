"""Is the update of a user's own step that of the undivided batch, however the batch is cut?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from wholebatch.core.batch import LogicalBatch
from wholebatch.evidence.certificate.cuts import Cut, equal_parts, ragged_parts
from wholebatch.evidence.certificate.judge import Judge
from wholebatch.evidence.certificate.rehearsal import Rehearsal, Stage
from wholebatch.evidence.certificate.sixteen import summed_in_16_bits

SOFT, LOUD = 2.0**-20, 2.0**20
"""What gradients are multiplied by: so small that no clip acts, and so large that every clip does."""

_DTYPES = {torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class Run:
    """A window that the step has seen.

    Attributes:
        cut: How it was cut.
        found: What the step did.
        loud: What gradients were multiplied by.
        fail_at: At which arrival of a gradient it ran out of memory, on purpose, and went on; None: it did not.
        clipped: What the step makes of the undivided gradient, where it clips that. Shape ``[entries]``.
    """

    cut: Cut
    found: Rehearsal
    loud: float = 1.0
    fail_at: int | None = None
    clipped: Tensor | None = None

    @cached_property
    def gradient(self) -> Tensor:
        """What the optimizer was given, as loud as it would have been. Shape ``[entries]``."""
        return self.found.gradient / self.loud if self.loud != 1.0 else self.found.gradient

    def error(self, judge: Judge) -> float:
        """Return how far it is from what it should be, relative."""
        return (judge if self.clipped is None else Judge(judge.probe, self.clipped, [])).off(self.gradient)

    def errors(self, judge: Judge) -> list[float]:
        """Return the relative error of each parameter's gradient."""
        return (judge if self.clipped is None else Judge(judge.probe, self.clipped, [])).errors(self.gradient)


@dataclass(slots=True)
class Trial:
    """Windows, judged together.

    Attributes:
        ok: Whether all are right.
        runs: The windows, one for each cut; two cuts may share one.
        soft: What gradients are to be multiplied by, so that no clip acts.
        stagnates: The windows in which gradients are added up in 16 bits.
    """

    ok: bool
    runs: list[Run]
    soft: float
    stagnates: list[Run] = field(default_factory=list)


class Attempt:
    """Runs a step on windows, and judges what it makes of them.

    Args:
        stage: Where the step runs.
        judge: Knows the gradient of the undivided batch.
        rows: The batch.
        move: Brings a micro-batch to the device.
    """

    def __init__(self, stage: Stage, judge: Judge, rows: LogicalBatch, move: Callable[[Any], Any]) -> None:
        self._stage, self._judge, self._rows, self._move = stage, judge, rows, move

    def at_once(self, cuts: Sequence[Cut]) -> Trial | None:
        """Return the trial of two windows, which show all that three do, or None where anything is wrong with them.

        One is ragged, and permuted as well. Its gradients are soft, so that no clip acts and only sums and divisions
        show. The other is by rows, with loud gradients and a lack of memory on the way. Where the soft ones are right
        and the loud ones are not, these may still be the undivided gradient, clipped as a whole.
        """
        if not _DTYPES.isdisjoint(parameter.dtype for parameter in self._judge.probe.parameters):
            return None  # sums in 16 bits show in three micro-batches that run to the end
        by_rows, _, ragged = cuts
        soft = self._run(ragged, SOFT)
        if self._once([soft]) and self._judge.off(soft.gradient) > 1:  # see `apart`: something that is never soft
            soft = self._run(ragged, 1.0)
        if not (self._once([soft]) and self._judge.right(soft.gradient)):
            return None
        try:
            loud = self._interrupted(by_rows, soft, LOUD)
        except Exception:
            loud = None
        if loud is None or not loud.found.steps:  # it may refuse gradients that are as loud
            loud = self._interrupted(by_rows, soft, 1.0)
        if not self._once([loud]):
            return None
        if not self._judge.is_whole(loud.gradient):
            loud = replace(loud, clipped=self._clip(loud, soft.loud))
        right = loud.clipped is not None or self._judge.right(loud.gradient)
        return Trial(True, [loud, soft, soft], soft.loud) if right else None

    def apart(self, cuts: Sequence[Cut]) -> Trial:
        """Return the trial of three windows: by rows, permuted with a lack of memory, and ragged with loud gradients.

        In the first two, gradients are soft.
        """
        wide = all(parameter.dtype != torch.float16 for parameter in self._judge.probe.parameters)
        soft, loud = (SOFT, LOUD) if wide else (1.0, 1.0)
        first = self._run(cuts[0], soft)
        own = self._own_window(first)
        if own is not None and own != len(cuts[0].parts):
            cuts = self._cut_anew(cuts, own)
            first = self._run(cuts[0], soft)
        trial = self._three(first, cuts, soft, loud)
        if not trial.ok and loud != 1.0 and self._once(trial.runs) and not self._linear(trial):
            # What a step adds to gradients by itself, as decoupled weight decay, is as large whether they are soft or
            # not.
            again = self._three(self._run(cuts[0], 1.0), cuts, 1.0, loud)
            trial = again if self._linear(again) else trial
        trial.stagnates = [run for run in trial.runs if run.fail_at is None and summed_in_16_bits(run.found)]
        trial.ok = trial.ok and not trial.stagnates
        return trial

    def _run(self, cut: Cut, loud: float) -> Run:
        return Run(cut, self._stage.run(self._take(cut), loud=loud), loud)

    def _three(self, first: Run, cuts: Sequence[Cut], soft: float, loud: float) -> Trial:
        _, permuted, ragged = cuts
        runs = [first, self._interrupted(permuted, first, soft), self._loud(ragged, loud)]
        trial = Trial(False, runs, soft)
        if self._once(runs) and self._linear(trial):
            *_, last = runs
            if not self._judge.is_whole(last.gradient):
                runs[-1] = last = replace(last, clipped=self._clip(last, soft))
            trial.ok = last.clipped is not None or self._judge.right(last.gradient)
        return trial

    def _once(self, runs: Sequence[Run]) -> bool:
        """Whether optimizer and schedule were stepped as often as they should be."""
        return all(len(run.found.steps) == 1 and run.found.schedule_steps <= 1 for run in runs)

    def _linear(self, trial: Trial) -> bool:
        """Whether all is right as long as no clip acts."""
        return all(self._judge.right(run.gradient) for run in trial.runs[:2])

    def _own_window(self, first: Run) -> int | None:
        """Return after how many micro-batches the step itself ends a window, where it does not take what comes."""
        steps, passes = first.found.steps, first.found.passes
        if not steps and passes and not first.found.moved:  # it waits for more
            row_by_row = Cut(first.cut.name, tuple([row] for row in range(self._rows.rows)))
            steps = self._run(row_by_row, first.loud).found.steps
            return steps[0] if steps and steps[0] > passes else None
        return steps[0] if len(steps) > 1 and 1 < steps[0] < passes else None

    def _cut_anew(self, cuts: Sequence[Cut], window: int) -> tuple[Cut, Cut, Cut]:
        """Return the cuts again, with so many micro-batches by rows, and one less in the ragged one."""
        by_rows, permuted, ragged = cuts
        parts = equal_parts(self._rows.rows, window)
        order = [row for part in permuted.parts for row in part]
        return (
            replace(by_rows, parts=parts),
            replace(permuted, parts=tuple([order[row] for row in part] for part in parts)),
            replace(ragged, parts=ragged_parts(self._rows.rows, max(1, window - 1))),
        )

    def _take(self, cut: Cut) -> list[Any]:
        return [self._move(self._rows.take(part)) for part in cut.parts]

    def _interrupted(self, cut: Cut, before: Run, loud: float) -> Run:
        """Run out of memory in the middle of the second backward pass; where that ends the step, run it without.

        Args:
            cut: How the window is cut.
            before: A window that went well, from which it is known how many gradients arrive in a pass.
            loud: What gradients are multiplied by.
        """
        if self._fails(cut, loud, 1) is None:  # at once, so that a step that gives up has not run for long
            return self._run(cut, loud)
        each = before.found.arrivals // max(1, before.found.passes)
        fail_at = each * min(1, len(cut.parts) - 1) + each // 2 + 1
        found = self._fails(cut, loud, fail_at)
        if found is None:
            return self._run(cut, loud)
        return Run(cut, found, loud, fail_at=fail_at if found.failed else None)

    def _fails(self, cut: Cut, loud: float, fail_at: int) -> Rehearsal | None:
        """Return what the step does when memory runs out; None where that ends it."""
        try:
            found = self._stage.run(self._take(cut), loud=loud, fail_at=fail_at)
        except Exception:  # after the planned failure, another one: that is the user's answer to it
            return None
        return found if found.escaped is None and found.steps else None

    def _loud(self, cut: Cut, loud: float) -> Run:
        """Run with loud gradients; where the step refuses those, as it may, without."""
        try:
            run = self._run(cut, loud)
        except Exception:
            run = None
        return run if run is not None and run.found.steps else self._run(cut, 1.0)

    def _clip(self, last: Run, soft: float) -> Tensor | None:
        usual = self._usual_clip(last)
        if usual is not None or self._judge.right(last.gradient):  # which takes another look at the parts
            return usual
        return self._of_the_whole(last, soft)

    def _usual_clip(self, last: Run) -> Tensor | None:
        """Return the undivided gradient, clipped by its norm or entry by entry, if that is what the step makes of it.

        That it is a clip, and no other divisor, shows in other rows that are as loud: they come to the same size.
        """
        found, whole = last.found.gradient.double(), self._judge.whole.double()
        if last.loud == 1.0:
            return None
        size, largest = float(found.norm()), float(found.abs().max())
        by_norm = torch.dot(found, whole) / torch.dot(whole, whole).clamp(min=1e-300) * whole
        by_value = (whole * last.loud).clamp(-largest, largest)
        wanted = next((each for each in (by_norm, by_value) if self._judge.same(found, each)), None)
        if wanted is None or size > float(whole.norm()) * last.loud:
            return None
        smallest = min(last.cut.parts, key=len)
        smallest = smallest if len(last.cut.parts) > 1 else smallest[: -(-len(smallest) // 2)]
        other = self._loud(replace(last.cut, parts=(smallest,)), last.loud)
        sizes = [(float(other.found.gradient.norm()), size), (float(other.found.gradient.abs().max()), largest)]
        same = other.loud == last.loud and any(abs(one - another) <= 0.01 * another for one, another in sizes)
        return wanted / last.loud if same else None

    def _of_the_whole(self, last: Run, soft: float) -> Tensor | None:
        """Return what the step makes of the undivided batch, if that is what it makes of the parts.

        Any clip passes, by layer, say; another divisor does not, since it shows in soft gradients of the same cut.
        """
        whole = self._run(replace(last.cut, parts=(range(self._rows.rows),)), last.loud)
        if len(whole.found.steps) != 1 or not self._judge.same(last.found.gradient, whole.found.gradient):
            return None
        return whole.gradient if self._judge.right(self._run(last.cut, soft).gradient) else None
