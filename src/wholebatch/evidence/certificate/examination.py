"""What is wrong with a user's own step? First whether anything is, then what, and on which line."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from wholebatch.core.batch import LogicalBatch
from wholebatch.engine.batchnorm import batch_dependent_layers
from wholebatch.engine.checks.causes import Cause, batch_norm_cause, diagnose, meets_nobody_cause, random_cause
from wholebatch.engine.checks.pieces import Probe
from wholebatch.engine.checks.silence import evaluating
from wholebatch.engine.device import input_device, move
from wholebatch.engine.transaction import Transaction
from wholebatch.evidence.certificate.cuts import Cut
from wholebatch.evidence.certificate.habits import Naming, clip_before_the_sum
from wholebatch.evidence.certificate.judge import Judge
from wholebatch.evidence.certificate.measured import Measured, Window, window
from wholebatch.evidence.certificate.rehearsal import Stage, StepFn
from wholebatch.evidence.certificate.sixteen import LONG, sixteen, stagnation, summed_in_16_bits
from wholebatch.evidence.certificate.source import definition, first_call, first_word
from wholebatch.evidence.certificate.stepcount import miscounts
from wholebatch.evidence.certificate.trial import Attempt, Run, Trial


def examine(
    step: StepFn, judge: Judge, rows: LogicalBatch, cuts: Sequence[Cut], roll_back: Callable[[], None]
) -> tuple[Trial, list[Cause]]:
    """Try a step on three cuts of a batch, and name what is wrong with it.

    Args:
        step: ``step(model, optimizer, micro_batches)``.
        judge: Knows the gradient of the undivided batch.
        rows: The batch.
        cuts: Three cuts of it.
        roll_back: Puts back what a window has changed in the model's buffers.

    Returns:
        The trial, and the causes, which are none where it is ok.
    """
    stage = Stage(judge.probe.model, step, roll_back)
    examination = _Examination(stage, judge.probe, rows, cuts, step)
    attempt = examination.attempt(judge)
    trial = attempt.at_once(cuts)
    if trial is None and examination.rounds_more():
        trial = attempt.at_once(cuts)
    trial = trial or attempt.apart(cuts)
    return trial, [] if trial.ok else examination.name(trial, judge)


CLIPS = ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "clamp", "clamp_", "clip", "clip_", "min")


class _Examination:
    def __init__(self, stage: Stage, probe: Probe, rows: LogicalBatch, cuts: Sequence[Cut], step: StepFn) -> None:
        self._step = step
        self._stage = stage
        self._probe = probe
        self._rows = rows
        self._cuts = cuts
        self._here = definition(step)
        self._device = input_device(probe.model)

    def attempt(self, judge: Judge) -> Attempt:
        return Attempt(self._stage, judge, self._rows, self._move)

    def rounds_more(self) -> bool:
        """Whether the step computes in a coarser dtype than was known, as under autocast; from then on it is known.

        That it rounds a sum of wide gradients to 16 bits is nothing to allow for.
        """
        if self._probe.eps >= torch.finfo(torch.bfloat16).eps:
            return False
        narrow = summed_in_16_bits(self._stage.run(self._take(self._cuts[0]), watch=True))
        return not narrow and self._probe.coarsen(lambda: self._stage.run(self._take(self._cuts[0])))

    def name(self, trial: Trial, judge: Judge) -> list[Cause]:
        """Silence what is known to depend on the cut, one after the other, and look at what is left."""
        model, causes = self._probe.model, []
        if self._meets():
            return [meets_nobody_cause()]
        layers = batch_dependent_layers(model)
        with quiet([layer for name, layer in model.named_modules() if name in layers]):
            if layers:
                causes.append(batch_norm_cause(layers))
                trial, judge = self._again(judge)
                if trial.ok:
                    return causes
            random = self._draws()
            if random:
                causes.append(random_cause(model))
            with quiet(list(model.modules()) if random else []):
                if random:
                    try:
                        trial, judge = self._again(judge)
                        if trial.ok or self._draws():
                            return causes
                    except Exception:  # some models give no loss in this mode, and what was found is all that can be
                        return causes
                return causes + self._habits(trial, judge)

    def _meets(self) -> bool:
        """Whether model or loss would meet the other micro-batches; buffers and random state are left alone."""
        transaction = Transaction(self._probe.model, self._device)
        transaction.begin()
        self._probe.run(range(self._rows.rows))
        transaction.roll_back()
        return self._probe.meets

    def _again(self, judge: Judge) -> tuple[Trial, Judge]:
        piece = self._probe.run(range(self._rows.rows))
        if piece is not None:
            whole = piece.gradient / piece.targets if piece.is_sum else piece.gradient
            judge = Judge(self._probe, whole, self._cuts[0].parts)
        attempt = self.attempt(judge)
        return attempt.at_once(self._cuts) or attempt.apart(self._cuts), judge

    def _draws(self) -> bool:
        """Whether the same window gives another gradient when it is run again."""
        micro_batches = self._take(self._cuts[0])
        first, second = (self._stage.run(micro_batches, watch=True).incoming for _ in range(2))
        return float((first - second).norm()) > self._probe.tolerance * float(first.norm())

    def _habits(self, trial: Trial, judge: Judge) -> list[Cause]:
        windows = [
            window(self._probe, run.cut, self._stage.run(self._take(run.cut), loud=trial.soft, watch=True))
            for run in trial.runs
        ]
        for each in windows:
            each.found.gradient = each.found.gradient.double() / trial.soft
        measured = Measured(self._probe, judge.whole.double(), windows, self._here)
        causes = miscounts(measured)
        if any(len(each.found.steps) != 1 for each in windows):
            return causes
        if not all(judge.right(each.found.gradient) for each in windows):
            causes += self._of_the_gradient(Naming(measured), windows, judge)
        elif not causes:
            causes += self._of_one_run(trial, windows, judge)
        return causes or [self._unknown()]

    def _of_the_gradient(self, naming: Naming, windows: list[Window], judge: Judge) -> list[Cause]:
        narrow = next((each for each in windows if summed_in_16_bits(each.found)), None)
        if narrow is not None:
            return [self._stagnation(narrow)]
        named = [] if naming.follows_the_loss() else naming.gradients()
        uneven = next((each for each in windows if not judge.right(each.shares @ each.means)), None)
        if uneven is None or any(cause.name == "temperature counted k times" for cause in named):
            return named
        of_the_loss = diagnose(self._probe, range(self._rows.rows), uneven.cut.parts)
        names = {cause.name for cause in named}
        return named + [cause for cause in of_the_loss if cause.name not in names]

    def _of_one_run(self, trial: Trial, windows: list[Window], judge: Judge) -> list[Cause]:
        """What shows only when memory runs out, when gradients are loud, or in the last bits of a sum."""
        _, interrupted, loud = trial.runs
        causes = []
        if interrupted.fail_at is not None and not judge.right(interrupted.gradient):
            causes.append(self._retry(interrupted, windows[1], judge))
        if loud.loud != 1.0 and not judge.right(loud.gradient) and loud.clipped is None:
            causes.append(clip_before_the_sum(self._clip_line(loud, windows[2])))
        if trial.stagnates:
            causes.append(self._stagnation(windows[trial.runs.index(trial.stagnates[0])]))
        return causes

    def _clip_line(self, loud: Run, held: Window) -> str | None:
        found = self._stage.run(self._take(loud.cut), loud=loud.loud, watch=True)
        watched = replace(held, found=found)
        place = watched.between("scaled", "clamped")
        place = place or first_call(CLIPS, [self._step], whole_file=False)
        place = place or watched.between("changed") or held.line("added") or self._here
        return str(place) if place is not None else None

    def _retry(self, run: Run, held: Window, judge: Judge) -> Cause:
        found = self._stage.run(self._take(run.cut), loud=run.loud, fail_at=run.fail_at, watch=True)
        where = str(found.handler or self._here or "") or None
        for place in range(held.number):
            rest = held.shares.clone()
            rest[place] = 0
            left = [part @ held.means for part in (rest, rest / rest.sum())]
            left += [self._nearest(run.gradient, judge.whole, each) for each in left]  # where its pass had begun
            if any(judge.same(run.gradient, each) for each in left):
                return Cause(
                    "dropped micro-batches",
                    f"When memory runs out on the way, micro-batch {place + 1} is left out of the update.",
                    "give up the window and run all of it again, in smaller micro-batches.",
                    where,
                )
        return Cause(
            "retry on partial gradients",
            "When memory runs out on the way and the step tries again, the gradients that were there already are "
            "counted twice.",
            "clear the gradients before trying again (p.grad = None), and run the whole window anew.",
            where,
        )

    def _nearest(self, gradient: Tensor, *others: Tensor) -> Tensor:
        """Of each parameter, the one of some gradients that is nearest. Shape ``[entries]``."""
        of_parameters = [each.split_with_sizes(self._probe.sizes) for each in (gradient, *others)]
        return torch.cat(
            [
                min(them, key=lambda each: float((each - found).norm()))
                for found, *them in zip(*of_parameters, strict=True)
            ]
        )

    def _stagnation(self, held: Window) -> Cause:
        """What becomes of a sum in 16 bits in a long window of micro-batches like these."""
        dtypes = {sixteen(parameter.dtype) for parameter in self._probe.parameters}
        name = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        off = stagnation(held.found.brought, self._probe.parameters, self._probe.sizes)
        wide = all(parameter.dtype not in dtypes for parameter in self._probe.parameters)
        place = first_word(("bfloat16", "float16", "half"), [self._step]) if wide else None
        place = place or held.line("added") or self._here
        return Cause(
            "stagnating bf16 sums",
            f"Gradients are added up in {name}: over {LONG:,} micro-batches like these, the sum would be off by "
            f"{off:.2g} (relative), since it stops growing.",
            "add them up in float32, and round once before optimizer.step(); wb.Accumulator does.",
            str(place) if place is not None else None,
        )

    def _unknown(self) -> Cause:
        return Cause(
            "unknown",
            "The update is not that of the undivided batch, and no mistake that is known explains it.",
            "compare the step with the plain loop: wholebatch.evidence.reference.",
            str(self._here) if self._here is not None else None,
        )

    def _take(self, cut: Cut) -> list[Any]:
        return [self._move(self._rows.take(part)) for part in cut.parts]

    @property
    def _move(self) -> Callable[[Any], Any]:
        return lambda micro_batch: move(micro_batch, self._device)


@contextmanager
def quiet(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Put layers into evaluation mode, each by itself, and keep them there also against ``model.train()``."""
    own = [(layer, vars(layer).get("train")) for layer in layers]  # of the user, or of those that are quiet already
    with evaluating(layers):
        for layer in layers:
            layer.train = lambda _mode=True, layer=layer: layer  # type: ignore[method-assign, misc]
        try:
            yield
        finally:
            for layer, train in own:
                del layer.train
                if train is not None:
                    vars(layer)["train"] = train
