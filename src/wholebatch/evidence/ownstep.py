"""What is wrong with a user's own step? First whether anything is, then what, and on which line."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from wholebatch.core.batch import LogicalBatch
from wholebatch.engine.batchnorm import batch_dependent_layers
from wholebatch.engine.causes import Cause, batch_norm_cause, diagnose, meets_nobody_cause, random_cause
from wholebatch.engine.device import input_device, move
from wholebatch.engine.pieces import Probe
from wholebatch.evidence.cuts import Cut
from wholebatch.evidence.habits import Naming, Window, clip_before_the_sum, window
from wholebatch.evidence.rehearsal import Stage, StepFn
from wholebatch.evidence.source import Place, definition
from wholebatch.evidence.trial import Judge, Run, Trial, try_step

LONG = 1024
"""How many micro-batches a window is imagined to have, to say what becomes of a sum in 16 bits."""


def examine(
    step: StepFn, probe: Probe, rows: LogicalBatch, cuts: Sequence[Cut], whole: Tensor
) -> tuple[Trial, list[Cause]]:
    """Try a step on three cuts of a batch, and name what is wrong with it.

    Args:
        step: ``step(model, optimizer, micro_batches)``.
        probe: Has model, objective and tolerance.
        rows: The batch.
        cuts: Three cuts of it.
        whole: The gradient of the undivided batch. Shape ``[entries]``.

    Returns:
        The trial, and the causes, which are none where it is ok.
    """
    with Stage(probe.model, step) as stage:
        examination = _Examination(stage, probe, rows, cuts, definition(step))
        trial = examination.attempt(whole)
        return trial, [] if trial.ok else examination.name(trial, whole)


class _Examination:
    def __init__(self, stage: Stage, probe: Probe, rows: LogicalBatch, cuts: Sequence[Cut], here: Place | None) -> None:
        self._stage = stage
        self._probe = probe
        self._rows = rows
        self._cuts = cuts
        self._here = here
        self._device = input_device(probe.model)

    def attempt(self, whole: Tensor) -> Trial:
        return try_step(self._stage, self._judge(whole), self._rows, self._cuts, self._move)

    def name(self, trial: Trial, whole: Tensor) -> list[Cause]:
        """Silence what is known to depend on the cut, one after the other, and look at what is left."""
        model, causes = self._probe.model, []
        self._probe.run(range(self._rows.rows))
        if self._probe.meets:
            return [meets_nobody_cause()]
        layers = batch_dependent_layers(model)
        with quiet([layer for name, layer in model.named_modules() if name in layers]):
            if layers:
                causes.append(batch_norm_cause(layers))
                trial, whole = self._again(whole)
                if trial.ok:
                    return causes
            random = self._draws()
            if random:
                causes.append(random_cause(model))
            with quiet(list(model.modules()) if random else []):
                if random:
                    try:
                        trial, whole = self._again(whole)
                        if trial.ok or self._draws():
                            return causes
                    except Exception:  # some models give no loss in this mode, and what was found is all that can be
                        return causes
                return causes + self._habits(trial, self._judge(whole))

    def _again(self, whole: Tensor) -> tuple[Trial, Tensor]:
        piece = self._probe.run(range(self._rows.rows))
        if piece is not None:
            whole = piece.gradient / piece.targets if piece.is_sum else piece.gradient
        return self.attempt(whole), whole

    def _draws(self) -> bool:
        """Whether the same window gives another gradient when it is run again."""
        micro_batches = self._take(self._cuts[0])
        first, second = (self._stage.run(micro_batches).incoming for _ in range(2))
        return float((first - second).norm()) > self._probe.tolerance * float(first.norm())

    def _habits(self, trial: Trial, judge: Judge) -> list[Cause]:
        windows = [window(self._probe, run.cut, self._stage.run(self._take(run.cut), watch=True)) for run in trial.runs]
        naming = Naming(self._probe, judge.whole, windows, self._here)
        causes = naming.counts()
        if any(len(each.found.steps) != 1 for each in windows):
            return causes
        if not all(judge.right(each.found.gradient) for each in windows) and not trial.clips:
            causes += self._of_the_gradient(naming, windows, judge)
        causes += self._of_one_run(trial, windows, judge) if not causes else []
        return causes or [self._unknown()]

    def _of_the_gradient(self, naming: Naming, windows: list[Window], judge: Judge) -> list[Cause]:
        sound = all(judge.right(each.shares @ each.means) for each in windows)
        named = [] if naming.follows_the_loss() else naming.gradients()
        if not named:  # what was clipped in the end is looked at as it was before
            before = [replace(each, found=replace(each.found, gradient=each.found.incoming)) for each in windows]
            again = Naming(self._probe, judge.whole, before, self._here)
            if not judge.right(before[-1].found.gradient) and not again.follows_the_loss():
                named = again.gradients()
        if sound or any(cause.name == "temperature counted k times" for cause in named):
            return named
        of_the_loss = diagnose(self._probe, range(self._rows.rows), windows[-1].cut.parts)
        names = {cause.name for cause in named}
        return named + [cause for cause in of_the_loss if cause.name not in names]

    def _of_one_run(self, trial: Trial, windows: list[Window], judge: Judge) -> list[Cause]:
        """What shows only when memory runs out, when gradients are loud, or in the last bits of a sum."""
        _, interrupted, loud = trial.runs
        causes = []
        if interrupted.fail_at is not None and not judge.right(interrupted.gradient):
            causes.append(self._retry(interrupted, windows[1], judge))
        if loud.loud != 1.0 and not judge.right(loud.gradient) and not trial.clips:
            found = self._stage.run(self._take(loud.cut), loud=loud.loud, watch=True)
            place = replace(windows[2], found=found).between("scaled", "clamped", "changed")
            place = place or windows[2].line("added") or self._here
            causes.append(clip_before_the_sum(str(place) if place is not None else None))
        if trial.stagnates:
            causes.append(self._stagnation(windows[0]))
        return causes

    def _retry(self, run: Run, held: Window, judge: Judge) -> Cause:
        found = self._stage.run(self._take(run.cut), fail_at=run.fail_at, watch=True)
        where = str(found.handler or self._here or "") or None
        for place in range(held.number):
            rest = held.shares.clone()
            rest[place] = 0
            if any(judge.right(run.gradient, part @ held.means) for part in (rest, rest / rest.sum())):
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

    def _stagnation(self, held: Window) -> Cause:
        """Add the gradients that came over and over, in the dtype of the weights, and say what becomes of the sum."""
        off = exact = 0.0
        steps = max(2, -(-LONG // max(1, len(held.found.brought))))
        for parameter, *parts in zip(
            self._probe.parameters,
            *(each.split_with_sizes(self._probe.sizes) for each in held.found.brought),
            strict=True,
        ):
            right = torch.stack(parts).sum(0) * steps
            total = torch.zeros_like(right, dtype=parameter.dtype if not parameter.is_complex() else torch.float32)
            for _ in range(steps):
                for part in parts:
                    total += part.to(total.dtype)
            off += float((total.double() - right).square().sum())
            exact += float(right.square().sum())
        name = str(next(p.dtype for p in self._probe.parameters if p.dtype in (torch.bfloat16, torch.float16)))
        place = held.line("added") or self._here
        return Cause(
            "stagnating bf16 sums",
            f"Gradients are added up in {name.removeprefix('torch.')}: over {LONG:,} micro-batches like these, the sum "
            f"would be off by {(off / max(exact, 1e-300)) ** 0.5:.2g} (relative), since it stops growing.",
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

    def _judge(self, whole: Tensor) -> Judge:
        return Judge(self._probe, whole, self._cuts[0].parts)

    def _take(self, cut: Cut) -> list[Any]:
        return [self._move(self._rows.take(part)) for part in cut.parts]

    @property
    def _move(self) -> Callable[[Any], Any]:
        return lambda micro_batch: move(micro_batch, self._device)


@contextmanager
def quiet(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Put layers into evaluation mode, each by itself, and keep them there also against ``model.train()``."""
    modes = [(layer, layer.training) for layer in layers]
    for layer in layers:
        layer.training = False
        layer.train = lambda _mode=True, layer=layer: layer  # type: ignore[method-assign, misc]
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode
            del layer.train
