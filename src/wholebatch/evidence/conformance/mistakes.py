"""Which mistake is it? A run that ends where a loop with a bad habit does has that habit too."""

from dataclasses import replace

from torch import nn

from wholebatch.evidence.conformance.habits import HABITS, STAGNATES, Habit
from wholebatch.evidence.conformance.loops import leaking, ranks_alike, shrunk, train
from wholebatch.evidence.conformance.task import PairTask, Task, flat
from wholebatch.evidence.conformance.two_passes import ANEW, PIECEWISE, two_passes

CLOSE = 1e-6
"""How near a run must come to the end of a wrong loop to have its mistake, relative to the way that both went."""

_IN_16_BITS = 0.25
"""The same where sums stagnate in 16 bits: the least difference in rounding decides when they do."""

_LEAK = "the discriminator steps with what the generator's loss has left in it"
_NORM = "batch norm sees micro-batches, and its running statistics move with each"
_ALIKE = "each rank weighs the same, whatever it holds"
_FOR_EACH = "the mean of all ranks counts once for each rank"
_APART = "rows meet only those of their own micro-batch"
_ANEW_SMALLER = "when memory runs out training begins anew, and the logical batch shrinks with the micro-batch"
_ON_SMALLER = "when memory runs out the epoch begins again with moved weights, and the logical batch shrinks"
_NO_LABEL = "the mean over no label is not a number"

NAMES = frozenset(
    {*HABITS, _LEAK, _NORM, _ALIKE, _FOR_EACH, _APART, _NO_LABEL, _ANEW_SMALLER, _ON_SMALLER, ANEW, PIECEWISE}
)
"""All mistakes that have a name."""


def name(task: Task | PairTask, found: nn.Module, right: nn.Module, tolerance: float) -> str | None:
    """Return the mistake of a run, or None where it is none that is known.

    Args:
        task: What was asked.
        found: The model as the run left it, off the right way.
        right: The model as the undivided batches leave it.
        tolerance: What counts as rounding in this scene, relative.
    """
    end = flat(found)
    if not bool(end.isfinite().all()):
        empty = isinstance(task, Task) and any(each is not None and int(task.targets(each)) == 0 for each in task.epoch)
        return _NO_LABEL if empty else None
    way = max(CLOSE, tolerance) * float((end - flat(task.make_model())).norm())
    due = flat(right)

    def ends_there(wrong: nn.Module) -> bool:
        """Whether a loop that is wrong here, as not every habit is in every scene, ends where the run does."""
        there = flat(wrong)
        return float((end - there).norm()) <= way < float((due - there).norm())

    if isinstance(task, PairTask):
        return _LEAK if task.adversarial and ends_there(leaking(task)) else None
    if "bf16" in task.asks:
        way = _IN_16_BITS * float((end - flat(task.make_model())).norm())
        return STAGNATES if any(ends_there(train(task, habit)) for habit in HABITS[STAGNATES]) else None
    if task.asks & {"coupled", "batch norm"}:
        if ends_there(train(task, Habit("window"))):
            return _APART if "coupled" in task.asks else _NORM
        found_out = next((said for said, wrong in two_passes(task, found) if ends_there(wrong)), None)
        if found_out is not None or not task.has_term:
            return found_out
    if "runs short" in task.asks:
        for said, anew in ((_ANEW_SMALLER, True), (_ON_SMALLER, False)):
            if ends_there(shrunk(task, anew=anew)):
                return said
    if task.ranks > 1 and ends_there(ranks_alike(task)):
        return _ALIKE
    if task.ranks > 1 and ends_there(train(replace(task, lr=task.lr * task.ranks), Habit())):
        return _FOR_EACH
    return next(
        (said for said, habits in HABITS.items() if any(ends_there(train(task, habit)) for habit in habits)), None
    )
