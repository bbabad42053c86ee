"""Which traps are there? Each as the smallest run that exposes it, with what is right in a sentence."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from wholebatch.evidence.conformance.coupled import COUPLED, OVER_RANKS
from wholebatch.evidence.conformance.models import (
    EXPERTS,
    IGNORED,
    TIME,
    VOCABULARY,
    Averaged,
    HalfOverflowing,
    Model,
    Normed,
    Overflowing,
    Players,
    Routed,
    RunsShort,
    Tagger,
)
from wholebatch.evidence.conformance.task import MicroBatch, PairTask, Task


@dataclass(frozen=True, slots=True)
class Scene:
    """A trap, as something that a system can be asked to do.

    Attributes:
        name: The trap and what it is about, such as ``"T1-ragged-counts"``.
        right: What is right, as a sentence.
        task: What is asked.
        tolerance: The largest relative error of the change of the weights that counts as rounding.
        refusal_will_do: Whether a clear error is an honest answer, so that wholebatch may give it.
    """

    name: str
    right: str
    task: Task | PairTask
    tolerance: float = 1e-10
    refusal_will_do: bool = False

    @property
    def trap(self) -> str:
        """The name of the trap, such as ``"T1"``."""
        return self.name.partition("-")[0]


ROWS = 2
"""Rows in a micro-batch of a scene."""


def labelled(counts: Sequence[int], *, rows: int = ROWS) -> list[MicroBatch]:
    """Return micro-batches that hold so many labels each, at random places; the rest of the labels is -100.

    Args:
        counts: Labels to be learned in each micro-batch, at most ``rows * 5``.
        rows: Rows in a micro-batch.
    """
    draw = torch.Generator().manual_seed(0)
    epoch = []
    for count in counts:
        input_ids = torch.randint(VOCABULARY, (rows, TIME), generator=draw)
        labels = torch.full((rows * TIME,), IGNORED)
        places = torch.randperm(rows * TIME, generator=draw)[:count]
        labels[places] = torch.randint(VOCABULARY, (count,), generator=draw)
        epoch.append({"input_ids": input_ids, "labels": labels.view(rows, TIME)})
    return epoch


def _seeded(make: Callable[[], Model]) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def _from_zero() -> nn.Module:
    """A tagger in bfloat16 whose head starts at 0, so that its change is its gradient, rounded once."""
    model = Tagger(torch.bfloat16)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    model.embedding.requires_grad_(False)
    return model


def _one_label() -> list[MicroBatch]:
    """1,024 micro-batches that all say the same, as when there is a lot to learn: each adds little to a large sum."""
    (micro_batch,) = labelled([10])
    micro_batch["labels"].fill_(3)
    return [micro_batch] * 1024


def _overflowing() -> list[MicroBatch]:
    """Two windows of 4; in the second micro-batch of the first stands the token that overflows, in none besides."""
    epoch = labelled([10] * 8)
    for place, micro_batch in enumerate(epoch):
        micro_batch["input_ids"] %= VOCABULARY - 1
        if place == 1:
            micro_batch["input_ids"][0, 0] = VOCABULARY - 1
    return epoch


def _players(rows: int = 4) -> list[MicroBatch]:
    draw = torch.Generator().manual_seed(0)
    return [
        {
            "noise": torch.randn(rows, 3, generator=draw, dtype=torch.float64),
            "real": torch.randn(rows, 4, generator=draw, dtype=torch.float64),
        }
        for _ in range(4)
    ]


def _alike() -> list[MicroBatch]:
    """Micro-batches that hold the same rows, over which a router is as balanced as over all of them together."""
    (micro_batch,) = labelled([10])
    return [micro_batch] * 4


BALANCE = 0.1
"""What a balancing loss is multiplied by."""


def balance(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Return how unevenly a router sends the tokens of these rows to its experts; shape ``[]``."""
    assert isinstance(model, Routed)
    leanings = model.route(micro_batch["input_ids"]).flatten(0, 1)
    sent = functional.one_hot(leanings.argmax(dim=-1), EXPERTS).to(leanings.dtype)
    return BALANCE * EXPERTS * (sent.mean(dim=0) * leanings.mean(dim=0)).sum()


def divergence(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Return how far what the model says is from saying nothing: KL divergence from uniform, a mean; shape ``[]``."""
    said: Tensor = model(micro_batch["input_ids"]).log_softmax(dim=-1)
    return (said.exp() * said).sum(dim=-1).mean() + math.log(VOCABULARY)


TAGGER = partial(_seeded, Tagger)
PLAYERS = partial(_seeded, Players)
FULL = [10] * 4
RAGGED = [1, 5, 3, 2]

SCENES: tuple[Scene, ...] = (
    Scene("T1-ragged-counts", "every target counts once", Task(TAGGER, labelled(RAGGED))),
    Scene(
        "T2-keywords",
        "a model that takes any keyword is divided for like any other",
        Task(TAGGER, labelled(FULL), takes_keywords=True),
    ),
    Scene(
        "T2-mean",
        "a loss that is a mean is divided by the micro-batches",
        Task(TAGGER, labelled(FULL), loss_form="mean"),
    ),
    Scene("T2-sum-over-count", "a loss that is a sum over a count is divided once", Task(TAGGER, labelled(FULL))),
    Scene("T3-tail", "a short last window is the mean of its own rows", Task(TAGGER, labelled([10] * 10), epochs=2)),
    Scene(
        "T3-tail-unsized",
        "the same from a loader that does not know its length; nothing goes over to the next epoch",
        Task(TAGGER, labelled([10] * 10), epochs=2, sized=False),
    ),
    Scene(
        "T3-shorter-than-a-window",
        "an epoch shorter than a window is one update",
        Task(TAGGER, labelled([10] * 3), epochs=2),
    ),
    Scene(
        "T4-masked-micro-batch",
        "a micro-batch without a label is left out of the divisor",
        Task(TAGGER, labelled([4, 0, 3, 2])),
    ),
    Scene(
        "T4-masked-window",
        "a window without a label is no update",
        Task(TAGGER, labelled([4, 3, 5, 2, 0, 0, 0, 0, 2, 6, 1, 3])),
    ),
    Scene(
        "T4-none",
        "a micro-batch that is None keeps its place in the window and adds nothing",
        Task(TAGGER, [None, *labelled([4, 3, 5, 2, 1, 6]), None, *labelled([3, 2]), None, *labelled([4])]),
    ),
    Scene(
        "T5-forward",
        "a micro-batch that does not fit any more is cut, and the logical batch stays what it is",
        Task(partial(_seeded, partial(RunsShort, 11)), labelled([10] * 8)),
    ),
    Scene(
        "T5-backward",
        "the same where memory runs out in a backward pass, half of whose gradients are there",
        Task(partial(_seeded, partial(RunsShort, 11, backward=True)), labelled([10] * 8)),
    ),
    Scene(
        "T6-stopped",
        "a run that is stopped inside a window goes on in it",
        Task(TAGGER, labelled([10] * 8), stops_before=6),
    ),
    Scene(
        "T7-zero-first",
        "gradients zeroed before the forward pass, as in any loop without accumulation, are not those of the window",
        Task(TAGGER, labelled(FULL), zero_first=True),
        refusal_will_do=True,
    ),
    Scene(
        "T7-two-windows-in-a-batch",
        "two windows may come in one batch of the loader",
        Task(TAGGER, labelled([10] * 16), slices=8),
    ),
    Scene(
        "T7-evaluation",
        "an evaluation that is begun and broken off inside a window changes nothing",
        Task(TAGGER, labelled([10] * 8), evaluates_after=frozenset({5})),
    ),
    Scene(
        "T7-evaluation-in-the-tail",
        "nor does it inside the short window at the end of an epoch, which is an update",
        Task(TAGGER, labelled([10] * 10), evaluates_after=frozenset({8})),
    ),
    Scene(
        "T7-exception",
        "a window that is given up after an exception leaves nothing behind",
        Task(TAGGER, labelled([10] * 12), fails_at=6),
    ),
    Scene(
        "T7-two-optimizers",
        "two optimizers may have windows of different length",
        PairTask(PLAYERS, _players(), window=1, generator_window=2, adversarial=False),
    ),
    Scene(
        "T7-gan",
        "the backward pass of the generator's loss adds nothing to the discriminator",
        PairTask(PLAYERS, _players()),
    ),
    *(Scene(*each) for each in COUPLED),
    Scene(
        "T9-regulariser",
        "a penalty on the weights counts once an update",
        Task(TAGGER, labelled(FULL), penalty=0.05),
    ),
    Scene(
        "T9-balancing-loss",
        "the balancing loss of a mixture of experts counts once an update",
        Task(partial(_seeded, Routed), _alike(), of_rows=balance),
    ),
    Scene(
        "T9-balance-of-the-batch",
        "the experts are balanced over the logical batch, and not in each micro-batch",
        Task(partial(_seeded, Routed), labelled(FULL), of_rows=balance, meets=True),
    ),
    Scene(
        "T9-divergence",
        "a KL term, a mean over all positions, counts once an update beside the mean over the labels",
        Task(TAGGER, labelled([4] * 4), of_rows=divergence),
    ),
    Scene(
        "T9-batch-norm",
        "batch norm normalises by the logical batch, and its running statistics move once an update",
        Task(partial(_seeded, Normed), labelled(FULL)),
    ),
    Scene(
        "T9-clipping",
        "the gradient of the window is clipped, not that of each micro-batch",
        Task(TAGGER, labelled([10] * 8), clip_norm=0.05),
        tolerance=1e-5,  # PyTorch adds 1e-6 to the norm that it divides by, Keras and Optax do not
    ),
    Scene(
        "T9-moving-average",
        "a moving average of the weights follows once an update",
        Task(partial(_seeded, Averaged), labelled([10] * 12), follows=True),
    ),
    Scene(
        "T9-schedule",
        "the learning rate is scheduled by updates",
        Task(TAGGER, labelled([10] * 12), lr_factor=lambda update: 0.5**update),
    ),
    Scene(
        "T10-sums-in-16-bits",
        "the sum of 1,024 gradients does not stagnate in bfloat16",
        Task(partial(_seeded, _from_zero), _one_label(), window=1024),
        tolerance=4 * torch.finfo(torch.bfloat16).eps,
    ),
    Scene(
        "T10-overflow",
        "a window that overflows in float16 is skipped as a whole, and the learning rate stays where it is",
        Task(
            partial(_seeded, Overflowing),
            _overflowing(),
            precision="fp16",
            overflows=frozenset({0}),
            lr_factor=lambda update: 0.5**update,
        ),
        tolerance=4 * torch.finfo(torch.float16).eps,
    ),
    Scene(
        "T10-two-optimizers",
        "two optimizers in one window: the loss scale divides both gradients once, and they are clipped together",
        Task(
            partial(_seeded, partial(Tagger, torch.float32)),
            labelled([10] * 8),
            second_lr=0.25,
            clip_norm=0.05,
            precision="fp16",
        ),
        tolerance=4 * torch.finfo(torch.float16).eps,
    ),
    Scene(
        "T10-one-of-two-overflows",
        "where the gradient of one of two optimizers overflows, neither steps",
        Task(
            partial(_seeded, HalfOverflowing),
            _overflowing(),
            second_lr=0.25,
            precision="fp16",
            overflows=frozenset({0}),
        ),
        tolerance=4 * torch.finfo(torch.float16).eps,
    ),
    Scene(
        "T1x2-ragged-counts",
        "every target counts once, whichever of two ranks holds it",
        Task(TAGGER, labelled([1, 5, 3, 2, 8, 2, 7, 1]), ranks=2),
    ),
    Scene(
        "T2x2-mean",
        "a loss that is a mean is divided by the micro-batches of both ranks",
        Task(TAGGER, labelled([10] * 8), ranks=2, loss_form="mean"),
    ),
    Scene(
        "T2x2-keywords",
        "so is that of a model that takes any keyword",
        Task(TAGGER, labelled([10] * 8), ranks=2, takes_keywords=True),
    ),
    Scene(
        "T2x2-no-accumulation",
        "the same with one micro-batch on each rank",
        Task(TAGGER, labelled([10] * 4), ranks=2, window=1, takes_keywords=True),
    ),
    Scene(
        "T4x2-masked-rank",
        "a rank without a label is left out of the divisor, and nobody waits for it",
        Task(TAGGER, labelled([4, 0, 3, 0, 2, 0, 5, 0]), ranks=2),
    ),
    *(Scene(*each) for each in OVER_RANKS),
    Scene(
        "T10x2-uneven-ranks",
        "ranks with 5 and 4 micro-batches make the update of all 9",
        Task(TAGGER, labelled([10] * 9), ranks=2, window=5),
    ),
)
"""The suite, in the order of the traps; those over two ranks at the end."""
