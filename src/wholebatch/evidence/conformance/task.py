"""What is a system asked to train, and what does it hand back?"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from wholebatch.evidence.conformance.models import IGNORED, Averaged, Players, RunsShort

MicroBatch: TypeAlias = dict[str, Tensor]
"""``input_ids`` and ``labels``, shape ``[rows, time]`` each; labels of -100 are not to be learned."""


TERMS = frozenset({"term", "term of rows", "batch norm", "coupled"})
"""What `Task.asks` of a system in which the user writes model and loss in PyTorch: no more than to run them."""


LOOP = TERMS | {
    "unsized",
    "None",
    "slices",
    "clipping",
    "schedule",
    "follows",
    "zero first",
    "evaluation",
    "bf16",
    "two players",
    "two windows",
    "stops",
    "runs short",
}
"""What it asks, on one rank and without a loss scale, of a system in which the user also writes the loop."""


class NotExpressible(Exception):  # noqa: N818 - a finding, not an error
    """A system has no documented way to do what a scene asks for; its message says what is missing."""


@dataclass(frozen=True, slots=True)
class Task:
    """A supervised training run under plain SGD, for whatever system.

    The objective of an update is the mean cross entropy over the labels of its window that are not -100, plus `term`
    where there is one. A system is free to build its own model from the weights of `make_model()`.

    Attributes:
        make_model: Returns the model in training mode, with the same weights in each call.
        epoch: The micro-batches of one epoch, in order; None is a micro-batch that could not be read.
        window: Micro-batches in one logical batch; an epoch's last may be short, and nothing goes over to the next.
        ranks: Processes that train together. They see the micro-batches of an epoch in turn, and a logical batch holds
            `window` of each.
        epochs: How often the epoch is seen.
        sized: Whether the loader knows its length.
        slices: Micro-batches in what the loader yields at once, joined by rows; the loop of the user cuts them apart.
        lr: Learning rate of ``torch.optim.SGD``.
        second_lr: Learning rate of a second optimizer, which steps the head; the first then steps the rest. They share
            the loss, the window, the loss scale and the bound, and what spoils one skips both.
        clip_norm: Bound for the 2-norm of the gradient of the window.
        lr_factor: What the learning rate is multiplied by at update 0, 1, 2, ...
        penalty: The coefficient of a penalty on the weights: ``penalty * sum(weight ** 2)`` is added to the mean as it
            stands, and counts once an update.
        of_rows: ``of_rows(model, micro_batch)``: a term that is a mean over all positions, with or without a label, and
            counts once an update as well.
        compares: ``compares(model, model(input_ids), labels)``: the loss, where it is not one of single labels: a mean
            over the rows of a batch, each compared with all of them.
        meets: Whether rows of one logical batch have to meet in the model or in the term, in whichever micro-batch they
            are.
        follows: Whether ``model.follow()`` is to be called after each update, as a moving average of weights asks for.
        loss_form: What the loss of the user is: a mean, or a sum over a count, which the user can tell apart.
        takes_keywords: Whether the model takes any keyword arguments, and ignores them.
        zero_first: Whether the loop of the user zeroes the gradients before it goes forward, as without accumulation.
        evaluates_after: Micro-batches (counted through the run) after which the loop begins an evaluation, with a
            loader of its own, and breaks it off.
        fails_at: A micro-batch at which the loss of the user raises a `BadSample`. Its logical batch is given up, and
            the loop goes on with the next.
        stops_before: A micro-batch (counted through the run) before which the process ends. What has been saved by then
            is all that another one has, which goes on with that micro-batch.
        precision: ``"fp16"`` for autocast with loss scaling; else as the weights are.
        overflows: The windows (0, 1, ...) whose gradient overflows in that precision: they are no update.
    """

    make_model: Callable[[], nn.Module]
    epoch: Sequence[MicroBatch | None]
    window: int = 4
    ranks: int = 1
    epochs: int = 1
    sized: bool = True
    slices: int = 1
    lr: float = 0.5
    second_lr: float | None = None
    clip_norm: float | None = None
    lr_factor: Callable[[int], float] | None = None
    penalty: float | None = None
    of_rows: Callable[[nn.Module, MicroBatch], Tensor] | None = None
    compares: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    meets: bool = False
    follows: bool = False
    loss_form: Literal["mean", "sum over count"] = "sum over count"
    takes_keywords: bool = False
    zero_first: bool = False
    evaluates_after: frozenset[int] = frozenset()
    fails_at: int | None = None
    stops_before: int | None = None
    precision: Literal["weights", "fp16"] = "weights"
    overflows: frozenset[int] = frozenset()

    @property
    def asks(self) -> frozenset[str]:
        """What it asks for beyond windows of micro-batches; a system that cannot say one of these is not judged."""
        wanted = {
            "ranks": self.ranks > 1,
            "unsized": not self.sized,
            "None": any(micro_batch is None for micro_batch in self.epoch),
            "slices": self.slices > 1,
            "two optimizers": self.second_lr is not None,
            "clipping": self.clip_norm is not None,
            "schedule": self.lr_factor is not None,
            "term": self.penalty is not None,
            "term of rows": self.of_rows is not None,
            "follows": self.follows,
            "zero first": self.zero_first,
            "evaluation": bool(self.evaluates_after),
            "exception": self.fails_at is not None,
            "stops": self.stops_before is not None,
            "runs short": isinstance(self.make_model(), RunsShort),
            "fp16": self.precision == "fp16",
            "bf16": next(self.make_model().parameters()).dtype == torch.bfloat16,
            "coupled": self.meets or self.compares is not None,
            "batch norm": any(isinstance(layer, nn.BatchNorm1d) for layer in self.make_model().modules()),
        }
        return frozenset(name for name, wants in wanted.items() if wants)

    def parts(self, model: nn.Module) -> list[tuple[list[nn.Parameter], float]]:
        """Return what each optimizer steps, and its learning rate: one with all weights that are trained, or two."""
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        if self.second_lr is None:
            return [(list(trained.values()), self.lr)]
        head = [weight for name, weight in trained.items() if name.startswith("head.")]
        rest = [weight for name, weight in trained.items() if not name.startswith("head.")]
        return [(rest, self.lr), (head, self.second_lr)]

    @property
    def whole_window(self) -> int:
        """Micro-batches in one logical batch, over all ranks."""
        return self.window * self.ranks

    def windows(self) -> Iterator[tuple[int, list[MicroBatch | None]]]:
        """Yield each logical batch of the run in order: the place of its first micro-batch, and its micro-batches."""
        for epoch in range(self.epochs):
            for start in range(0, len(self.epoch), self.whole_window):
                yield epoch * len(self.epoch) + start, list(self.epoch[start : start + self.whole_window])

    def loader(self) -> Iterator[MicroBatch | None]:
        """Yield what the loader of the user yields in one epoch: micro-batches, or `slices` of them joined."""
        for start in range(0, len(self.epoch), self.slices):
            yield join(self.epoch[start : start + self.slices]) if self.slices > 1 else self.epoch[start]

    def cut(self, loaded: MicroBatch | None) -> list[MicroBatch | None]:
        """Return the micro-batches in what the loader yielded at once, as the loop of the user cuts them apart."""
        if self.slices == 1 or loaded is None:
            return [loaded]
        parts = {name: tensor.chunk(self.slices) for name, tensor in loaded.items()}
        return [{name: part[place] for name, part in parts.items()} for place in range(self.slices)]

    def loss_sum(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """Return the sum of the cross entropy over the labels, or what `compares` says of the rows; shape ``[]``."""
        outputs, labels = model(micro_batch["input_ids"]), micro_batch["labels"]
        if self.compares is not None:
            return self.compares(model, outputs, labels) * self.targets(micro_batch)
        return cross_entropy(outputs, labels)

    def loss_of(self, model: nn.Module, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss without the term, as one writes it for what came out of the model; shape ``[]``."""
        if self.compares is not None:
            return self.compares(model, outputs, labels)
        return cross_entropy(outputs, labels) / (labels != IGNORED).sum()

    def targets(self, micro_batch: MicroBatch) -> Tensor:
        """Return how many labels are to be learned; a row that is compared has one. Shape ``[]``, an integer."""
        return (micro_batch["labels"] != IGNORED).sum()

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """Return the loss as one writes it for a single batch: the masked mean, and the term."""
        mean = self.loss_sum(model, micro_batch) / self.targets(micro_batch)
        return mean + self.term(model, micro_batch) if self.has_term else mean

    @property
    def has_term(self) -> bool:
        """Whether something is added to the mean."""
        return self.penalty is not None or self.of_rows is not None

    def term(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """Return what is added to the mean: the penalty on the weights, or the term of the rows; shape ``[]``."""
        if self.of_rows is not None:
            return self.of_rows(model, micro_batch)
        assert self.penalty is not None
        return self.penalty * torch.stack([weight.square().sum() for weight in model.parameters()]).sum()

    def after_update(self, model: nn.Module) -> None:
        """Do what the user does once an update."""
        if self.follows and isinstance(model, Averaged):
            model.follow()

    def evaluate(self, model: nn.Module) -> None:
        """Begin an evaluation and break it off after one micro-batch, as a loop does that looks for a sign of life."""
        model.eval()
        with torch.no_grad():
            for micro_batch in self.epoch:
                if micro_batch is not None:
                    self.loss_sum(model, micro_batch)
                    break
        model.train()

    def check(self, place: int) -> None:
        """Raise a `BadSample` where the run is to fail; the loss of the user calls this with the place in the run."""
        if place == self.fails_at:
            raise BadSample(f"micro-batch {place} cannot be read")


class BadSample(ValueError):  # noqa: N818 - what is wrong in a scene, not here
    """What the loss of the user raises in a scene."""


@dataclass(frozen=True, slots=True)
class PairTask:
    """Two models with an optimizer each, in a loop of the user's own.

    Attributes:
        make_model: Returns the two, with the same weights in each call.
        epoch: Micro-batches in order: ``noise`` of shape ``[rows, 3]``, ``real`` of shape ``[rows, 4]``.
        window: Micro-batches in a logical batch of the discriminator.
        generator_window: Micro-batches in a logical batch of the generator.
        adversarial: Whether the generator's loss passes through the discriminator. Else it is a regression to `real`,
            and the two have nothing to do with each other.
        lr: Learning rate of both.
    """

    make_model: Callable[[], Players]
    epoch: Sequence[MicroBatch]
    window: int = 2
    generator_window: int = 2
    adversarial: bool = True
    lr: float = 0.5

    @property
    def asks(self) -> frozenset[str]:
        """What it asks for; see `Task.asks`."""
        wanted = {
            "two players": self.window == self.generator_window,
            "two windows": self.window != self.generator_window,
        }
        return frozenset(name for name, wants in wanted.items() if wants)

    def discriminator_loss(self, model: Players, micro_batch: MicroBatch) -> Tensor:
        """Return the mean over the rows of how badly real and made samples are told apart; shape ``[]``."""
        real = model.discriminator(micro_batch["real"])
        made = model.discriminator(model.generator(micro_batch["noise"]).detach())
        return functional.softplus(-real).mean() + functional.softplus(made).mean()

    def generator_loss(self, model: Players, micro_batch: MicroBatch) -> Tensor:
        """Return the mean over the rows of how badly the generator does; shape ``[]``."""
        made = model.generator(micro_batch["noise"])
        if self.adversarial:
            return functional.softplus(-model.discriminator(made)).mean()
        loss: Tensor = (made - micro_batch["real"]).square().mean()
        return loss


@dataclass(frozen=True, slots=True)
class Trained:
    """What a system made of a task.

    Attributes:
        model: With the weights at the end of the run.
        updates: Optimizer steps; of two optimizers, those of both together.
        losses: What the system itself reports as the loss of each update; None where it reports none.
    """

    model: nn.Module
    updates: int
    losses: Sequence[float] | None = None


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross entropy over the labels that are not -100, masked by hand as most code does it."""
    each = functional.cross_entropy(logits.flatten(0, 1), labels.flatten().clamp(min=0), reduction="none")
    return (each * (labels.flatten() != IGNORED)).sum()


def flat(model: nn.Module) -> Tensor:
    """Return weights and buffers, one after the other, in float64; counters, such as those of batch norm, left out."""
    state = [tensor.detach() for tensor in model.state_dict().values() if tensor.is_floating_point()]
    return torch.cat([tensor.flatten().to("cpu", torch.float64) for tensor in state])


def steps_of(optimizer: Optimizer) -> Callable[[], int]:
    """Return a function that says how often the optimizer has stepped since; a skipped step is none."""
    steps: list[None] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(None))
    return lambda: len(steps)


def join(micro_batches: Sequence[MicroBatch | None]) -> MicroBatch:
    """Return the rows of some micro-batches as one; those that are None are left out."""
    there = [micro_batch for micro_batch in micro_batches if micro_batch is not None]
    return {name: torch.cat([micro_batch[name] for micro_batch in there]) for name in there[0]} if there else {}
