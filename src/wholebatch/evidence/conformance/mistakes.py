"""Which mistake is it? Loops, each with a habit that goes wrong: a run that ends where one of them does has it too."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD

from wholebatch.evidence.conformance.models import Players
from wholebatch.evidence.conformance.task import MicroBatch, PairTask, Task, flat, join
from wholebatch.evidence.conformance.two_passes import two_passes

CLOSE = 1e-6
"""How near a run must come to the end of a wrong loop to have its mistake, relative to the way that both went."""


@dataclass(frozen=True, slots=True)
class Habit:
    """How a loop divides, keeps and steps. The defaults are right.

    Attributes:
        divide_by: What the losses of a window are divided by: the sum by its targets; or each micro-batch's mean by the
            number of those that came, by the number that a window should have, or by nothing.
        keep: Whether all gradients of a window count, or only the last one.
        tail: Whether a short window at the end of an epoch is an update, is dropped, leaves its gradients to the first
            window of the next epoch, or runs on there until it is full.
        clip: Whether the gradient of the window is clipped, or that of each micro-batch.
        term: Whether the term counts once in a window, or once for each micro-batch.
        step: Whether the optimizer steps once a window, or after each micro-batch.
        given_up: What is left of a window that was given up: nothing, or its gradients until then.
        skipped: Whether a window that overflows is no update, or counts as one for the schedule.
        sum_in: Whether gradients are added up exactly, or in the dtype of the weights.
        evaluated: What an evaluation leaves of the window in which it begins: all, or nothing.
        schedule: Whether the learning rate goes by updates, or by micro-batches.
        follow: Whether a moving average follows once an update, or after each micro-batch.
        evened: Whether an epoch repeats its first micro-batches until all ranks have equally many.
    """

    divide_by: Literal["targets", "micro-batches", "window", "nothing"] = "targets"
    keep: Literal["all", "last"] = "all"
    tail: Literal["update", "drop", "carry", "run on"] = "update"
    clip: Literal["window", "micro-batch"] = "window"
    term: Literal["once", "each"] = "once"
    step: Literal["window", "micro-batch"] = "window"
    given_up: Literal["nothing", "gradients"] = "nothing"
    skipped: Literal["nothing", "counts"] = "nothing"
    sum_in: Literal["exact", "weights"] = "exact"
    evaluated: Literal["all", "nothing"] = "all"
    schedule: Literal["updates", "micro-batches"] = "updates"
    follow: Literal["update", "micro-batch"] = "update"
    evened: bool = False


_IN_16_BITS = 0.25
"""The same where sums stagnate in 16 bits: the least difference in rounding decides when they do."""

_STAGNATES = "the sum of the gradients stagnates in the dtype of the weights"

HABITS: dict[str, tuple[Habit, ...]] = {
    "a mean of means: each micro-batch weighs the same, whatever it holds": (Habit("micro-batches"),),
    "the means of the micro-batches are added up, and divided by nothing": (Habit("nothing"),),
    "a short window is divided by the number of a full one": (Habit("window"),),
    "the tail of an epoch is dropped": (Habit("window", tail="drop"), Habit(tail="drop")),
    "the tail of an epoch is carried into the next": (Habit("window", tail="carry"),),
    "a window runs on into the next epoch until it is full": (Habit("window", tail="run on"),),
    "only the last micro-batch of a window counts": (
        Habit("window", keep="last"),
        Habit("nothing", keep="last"),
        Habit(keep="last"),
    ),
    "each micro-batch's gradient is clipped": (
        Habit("window", clip="micro-batch"),
        Habit("nothing", clip="micro-batch"),
    ),
    "the term counts once for each micro-batch": (Habit(term="each"),),
    _STAGNATES: (
        Habit("window", sum_in="weights"),
        Habit("micro-batches", sum_in="weights"),
        Habit(sum_in="weights"),
    ),
    "the optimizer steps after each micro-batch": (
        Habit("window", step="micro-batch"),
        Habit("nothing", step="micro-batch"),
    ),
    "what a window had gathered when it was given up joins the next": (Habit("window", given_up="gradients"),),
    "the schedule goes on although the update was skipped": (Habit("window", skipped="counts"),),
    "the schedule goes on with each micro-batch": (Habit(schedule="micro-batches"),),
    "the moving average follows each micro-batch": (Habit(follow="micro-batch"),),
    "micro-batches come twice, so that all ranks have equally many": (
        Habit(evened=True),
        Habit("micro-batches", evened=True),
        Habit("nothing", evened=True),
    ),
    "an evaluation zeroes what the window had gathered": (Habit("window", evaluated="nothing"),),
}
"""The mistakes by name, with the ways in which they come."""

_LEAK = "the discriminator steps with what the generator's loss has left in it"
_TWICE = "the second optimizer's gradient is divided by the loss scale twice"
_NORM = "batch norm sees micro-batches, and its running statistics move with each"
_ALIKE = "each rank weighs the same, whatever it holds"
_FOR_EACH = "the mean of all ranks counts once for each rank"
_APART = "rows meet only those of their own micro-batch"
_NO_LABEL = "the mean over no label is not a number"


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
        if task.adversarial:
            return _LEAK if ends_there(_leaking(task)) else None
        return _TWICE if task.precision == "fp16" and ends_there(_divided_twice(task, right)) else None
    if "bf16" in task.asks:
        way = _IN_16_BITS * float((end - flat(task.make_model())).norm())
        return _STAGNATES if any(ends_there(train(task, habit)) for habit in HABITS[_STAGNATES]) else None
    if task.asks & {"coupled", "batch norm"}:
        if ends_there(train(task, Habit("window"))):
            return _APART if "coupled" in task.asks else _NORM
        found_out = next((said for said, wrong in two_passes(task, found) if ends_there(wrong)), None)
        if found_out is not None or not task.has_term:
            return found_out
    if task.ranks > 1 and ends_there(_ranks_alike(task)):
        return _ALIKE
    if task.ranks > 1 and ends_there(train(replace(task, lr=task.lr * task.ranks), Habit())):
        return _FOR_EACH
    return next(
        (said for said, habits in HABITS.items() if any(ends_there(train(task, habit)) for habit in habits)), None
    )


def train(task: Task, habit: Habit) -> nn.Module:
    """Return the model at the end of a run with a habit."""
    if habit.evened and len(task.epoch) % task.ranks:
        task = replace(task, epoch=[*task.epoch, *task.epoch[: -len(task.epoch) % task.ranks]])
    model = task.make_model()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    loop = _Loop(task, habit, model, weights)
    for epoch in range(task.epochs):
        for place, micro_batch in enumerate(task.epoch, epoch * len(task.epoch)):
            if loop.gives_up(place):
                continue
            loop.add(micro_batch)
            if habit.evaluated == "nothing" and place in task.evaluates_after:
                loop.forget()
            if loop.places == task.whole_window or habit.step == "micro-batch":
                loop.update()
            if habit.follow == "micro-batch":
                task.after_update(model)
        loop.end_epoch()
    return model


class _Loop:
    """A window as the habit has it."""

    def __init__(self, task: Task, habit: Habit, model: nn.Module, weights: list[nn.Parameter]) -> None:
        self._task, self._habit, self._model, self._weights = task, habit, model, weights
        self._updates = self._windows = self._seen = 0
        self._clear()

    def _clear(self) -> None:
        exact = self._habit.sum_in == "exact"
        self._sums = [torch.zeros_like(each, dtype=torch.float64 if exact else each.dtype) for each in self._weights]
        self._terms: list[tuple[Tensor, ...]] = []
        self.places = 0
        self._targets = 0

    def forget(self) -> None:
        """Zero what the window has gathered, and go on with it."""
        self._sums = [torch.zeros_like(each) for each in self._sums]

    def gives_up(self, place: int) -> bool:
        """Whether a micro-batch belongs to the window in which the loss of the user raises; forgets that window."""
        fails_at = self._task.fails_at
        if fails_at is None or place // self._task.window != fails_at // self._task.window:
            return False
        if place < fails_at:
            return False
        if self._habit.given_up == "nothing":
            self._clear()
        self.places = 0
        return True

    def add(self, micro_batch: MicroBatch | None) -> None:
        """Add the gradient of a micro-batch to the window."""
        self.places += 1
        self._seen += 1
        if micro_batch is None or int(self._task.targets(micro_batch)) == 0:
            return
        gradients = self._divided(micro_batch)
        if self._habit.clip == "micro-batch":
            gradients = self._clipped(gradients)
        if self._habit.keep == "last":
            self.forget()
            self._targets = 0
        self._targets += int(self._task.targets(micro_batch))
        for total, gradient in zip(self._sums, gradients, strict=True):
            total += gradient
        if self._task.has_term:
            term = self._task.term(self._model, micro_batch)
            self._terms.append(torch.autograd.grad(term, self._weights, allow_unused=True, materialize_grads=True))

    def _divided(self, micro_batch: MicroBatch) -> list[Tensor]:
        """The gradient of a micro-batch, divided as far as a loop divides before it goes backward."""
        loss = self._task.loss_sum(self._model, micro_batch)
        if self._habit.divide_by != "targets":
            loss = loss / self._task.targets(micro_batch)
        if self._habit.divide_by == "window":
            loss = loss / self._task.whole_window
        return list(torch.autograd.grad(loss, self._weights, allow_unused=True, materialize_grads=True))

    def update(self) -> None:
        """Step with the gradient of the window, if it holds a target and does not overflow."""
        number, self._windows = self._windows, self._windows + 1
        if number in self._task.overflows:
            self._updates += self._habit.skipped == "counts"
        elif self._targets > 0:
            divisor = {"targets": self._targets, "micro-batches": self.places}.get(self._habit.divide_by, 1)
            gradients = [total / divisor for total in self._sums]
            if self._terms:
                count = 1 if self._habit.term == "each" else len(self._terms)
                terms = [torch.stack(each).sum(dim=0) / count for each in zip(*self._terms, strict=True)]
                gradients = [gradient + term for gradient, term in zip(gradients, terms, strict=True)]
            if self._habit.clip == "window":
                gradients = self._clipped(gradients)
            stepped = self._updates if self._habit.schedule == "updates" else self._seen - 1
            factor = self._task.lr_factor(stepped) if self._task.lr_factor else 1.0
            with torch.no_grad():
                for weight, gradient in zip(self._weights, gradients, strict=True):
                    weight.sub_(self._task.lr * factor * gradient.to(weight.dtype))
            self._updates += 1
            if self._habit.follow == "update":
                self._task.after_update(self._model)
        self._clear()

    def end_epoch(self) -> None:
        """Do with a short window what the habit does."""
        if self._habit.tail == "update" and self.places:
            self.update()
        elif self._habit.tail == "drop":
            self._clear()
        if self._habit.tail != "run on":
            self.places = 0

    def _clipped(self, gradients: list[Tensor]) -> list[Tensor]:
        if self._task.clip_norm is None:
            return gradients
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        factor = torch.clamp(self._task.clip_norm / (norm + 1e-6), max=1.0)
        return [gradient * factor for gradient in gradients]


def _ranks_alike(task: Task) -> nn.Module:
    """Ranks that each compute the mean over their own targets, and average these means."""
    model = task.make_model()
    optimizer = SGD(model.parameters(), lr=task.lr)
    for _, micro_batches in task.windows():
        optimizer.zero_grad()
        for rank in range(task.ranks):
            batch = join(micro_batches[rank :: task.ranks])
            if batch and int(task.targets(batch)) > 0:
                torch.autograd.backward(task.loss(model, batch) / task.ranks)
        optimizer.step()
    return model


def _leaking(task: PairTask) -> nn.Module:
    """Two players in which the generator's backward pass leaves its gradient in the discriminator."""
    model = task.make_model()
    for place, micro_batch in enumerate(task.epoch, 1):
        torch.autograd.backward(task.discriminator_loss(model, micro_batch) / task.window)
        torch.autograd.backward(task.generator_loss(model, micro_batch) / task.generator_window)
        for player, window in ((model.discriminator, task.window), (model.generator, task.generator_window)):
            if place % window == 0:
                SGD(player.parameters(), lr=task.lr).step()
                player.zero_grad()
    return model


def _divided_twice(task: PairTask, right: nn.Module) -> nn.Module:
    """The right end for the first player; the second stays where it was, up to what a loss scale of 65,536 leaves."""
    model = task.make_model()
    assert isinstance(right, Players)
    model.discriminator.load_state_dict(right.discriminator.state_dict())
    return model
