"""What does a loop with a bad habit make of a task? Each is run, so that a run which ends there can be named."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import SGD

from wholebatch.evidence.conformance.habits import Habit
from wholebatch.evidence.conformance.models import with_enough_memory
from wholebatch.evidence.conformance.task import MicroBatch, PairTask, Task, join

_LOSS_SCALE = 65536.0
"""Where PyTorch's loss scale begins."""


def train(task: Task, habit: Habit) -> nn.Module:
    """Return the model at the end of a run with a habit."""
    if habit.evened and len(task.epoch) % task.ranks:
        task = replace(task, epoch=[*task.epoch, *task.epoch[: -len(task.epoch) % task.ranks]])
    if habit.cut == "every k-th row":
        task = replace(
            task,
            epoch=[part for _, window in replace(task, epochs=1).windows() for part in _dealt(window, len(window))],
        )
    if habit.stopped == "sees again":
        task = replace(task, epoch=[*task.epoch[: task.stops_before or 0], *task.epoch])
    model = with_enough_memory(task.make_model())
    loop = _Loop(task, habit, model)
    due = task.epochs * sum(1 for _ in replace(task, epochs=1).windows())
    epoch = 0
    while epoch < task.epochs or (habit.repeats and 0 < loop.updates < due):
        for place, micro_batch in enumerate(task.epoch, epoch * len(task.epoch)):
            if loop.gives_up(place) or (habit.repeats and loop.updates == due):
                continue
            if habit.skipped == "micro-batch" and loop.overflows(micro_batch):
                continue
            if habit.stopped == "forgets" and place == task.stops_before:
                loop.forget()
            loop.add(micro_batch)
            if habit.evaluated == "nothing" and place in task.evaluates_after:
                loop.forget()
            if loop.places == task.whole_window or habit.step == "micro-batch":
                loop.close(micro_batch)
            if habit.follow == "micro-batch":
                task.after_update(model)
        loop.end_epoch()
        epoch += 1
    return model


def _dealt(micro_batches: Sequence[MicroBatch | None], count: int) -> list[MicroBatch]:
    """The rows of some micro-batches, dealt out to so many in turn."""
    batch = join(micro_batches)
    return [{name: tensor[place::count] for name, tensor in batch.items()} for place in range(count)]


class _Loop:
    """A window as the habit has it."""

    def __init__(self, task: Task, habit: Habit, model: nn.Module) -> None:
        self._task, self._habit, self._model = task, habit, model
        parts = [[(weight, lr, part) for weight in weights] for part, (weights, lr) in enumerate(task.parts(model))]
        self._weights, rates, self._parts = zip(*(each for part in parts for each in part), strict=True)
        scale = _LOSS_SCALE if habit.unscaled == "twice" else 1.0
        self._rates = [lr / scale if part else lr for lr, part in zip(rates, self._parts, strict=True)]
        self.updates = self._windows = self._seen = 0
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

    def overflows(self, micro_batch: MicroBatch | None) -> bool:
        """Whether what the model makes of a micro-batch is beyond what float16 can hold."""
        if micro_batch is None or not self._task.overflows:
            return False
        with torch.no_grad():
            logits = self._model(micro_batch["input_ids"])
        return float(logits.abs().max()) > torch.finfo(torch.float16).max

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
        task, by = self._task, self._habit.divide_by
        loss = task.loss_sum(self._model, micro_batch)
        if by != "targets":
            loss = loss / task.targets(micro_batch)
        if by == "window":
            loss = loss / task.whole_window
        elif by == "to come":
            opened = (self._seen - 1) % len(task.epoch) // task.whole_window * task.whole_window
            loss = loss / min(task.whole_window, len(task.epoch) - opened)
        elif by == "average rows":
            windows = -(-len(task.epoch) // task.whole_window)
            loss = loss * len(micro_batch["labels"]) / (len(join(task.epoch)["labels"]) // windows)
        return list(torch.autograd.grad(loss, self._weights, allow_unused=True, materialize_grads=True))

    def close(self, last: MicroBatch | None) -> None:
        """End a full window, whose last micro-batch is given."""
        if last is not None or self._habit.none_last == "update":
            self.update()
        elif self._habit.none_last == "drop":
            self._clear()
        self.places = 0

    def update(self) -> None:
        """Step with the gradient of the window, if it holds a target and does not overflow."""
        number, self._windows = self._windows, self._windows + 1
        if number in self._task.overflows and self._habit.skipped != "micro-batch":
            self.updates += self._habit.skipped == "counts"
            if self._habit.skipped == "second steps":
                self._step(
                    [
                        each if part else torch.zeros_like(each)
                        for each, part in zip(self._gradients(), self._parts, strict=True)
                    ]
                )
        elif self._targets > 0:
            self._step(self._gradients())
            self.updates += 1
            if self._habit.follow == "update":
                self._task.after_update(self._model)
        self._clear()

    def _gradients(self) -> list[Tensor]:
        """The gradient of the window."""
        divisor = {"targets": self._targets, "micro-batches": self.places}.get(self._habit.divide_by, 1)
        gradients = [total / divisor for total in self._sums]
        if self._terms:
            count = 1 if self._habit.term == "each" else len(self._terms)
            terms = [torch.stack(each).sum(dim=0) / count for each in zip(*self._terms, strict=True)]
            gradients = [gradient + term for gradient, term in zip(gradients, terms, strict=True)]
        if self._habit.clip == "optimizer":
            by_part = [
                self._clipped([g for g, own in zip(gradients, self._parts, strict=True) if own == part])
                for part in sorted(set(self._parts))
            ]
            gradients = [gradient for part in by_part for gradient in part]
        return self._clipped(gradients) if self._habit.clip == "window" else gradients

    def _step(self, gradients: Sequence[Tensor]) -> None:
        stepped = self.updates if self._habit.schedule == "updates" else self._seen - 1
        factor = self._task.lr_factor(stepped) if self._task.lr_factor else 1.0
        with torch.no_grad():
            for weight, lr, gradient in zip(self._weights, self._rates, gradients, strict=True):
                weight.sub_(lr * factor * gradient.to(weight.dtype))

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


def shrunk(task: Task, *, anew: bool) -> nn.Module:
    """A run that begins again with a row a micro-batch when memory runs out, and as many of them in a window.

    Args:
        task: What was asked.
        anew: Whether it begins with the first weights, or with those that it has.
    """
    rows = [row for each in task.epoch if each is not None for row in _dealt([each], len(each["labels"]))]
    again = replace(task, epoch=rows)
    if anew:
        return train(again, Habit())
    moved = train(replace(task, epoch=task.epoch[: task.window]), Habit())
    return train(replace(again, make_model=lambda: copy.deepcopy(moved)), Habit())


def ranks_alike(task: Task) -> nn.Module:
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


def leaking(task: PairTask) -> nn.Module:
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
