"""Which losses and layers see more than their own rows? Each as a task, and what is right in a sentence."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from wholebatch.evidence.conformance.encoders import Encoder, StandardisedTagger
from wholebatch.evidence.conformance.models import TIME, VOCABULARY
from wholebatch.evidence.conformance.task import MicroBatch, Task

MARGIN = 0.5
"""Of the triplets, in units of distance."""

KINDS = 3


def in_batch_negatives(model: nn.Module, points: Tensor, _labels: Tensor) -> Tensor:
    """Return the two-sided InfoNCE of the texts of a batch: a mean over its rows; shape ``[]``.

    Args:
        model: Has the temperature.
        points: Of each row and of its partner; shape ``[rows, 2, width]``.
    """
    encoder = getattr(model, "module", model)  # what is around it on several ranks
    assert isinstance(encoder, Encoder)
    queries, keys = points.unbind(dim=1)
    logits = queries @ keys.T / encoder.log_temperature.exp()
    own = torch.arange(len(points))
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def hard_triplets(_model: nn.Module, points: Tensor, labels: Tensor) -> Tensor:
    """Return by how much the farthest like is farther than the nearest unlike: a mean over the rows; shape ``[]``.

    A row that has no like, or no unlike, counts as 0.

    Args:
        points: Shape ``[rows, width]``.
        labels: The kind of each row; shape ``[rows]``.
    """
    distance = (points[:, None] - points[None]).square().sum(dim=-1).clamp(min=1e-24).sqrt()
    same = labels[:, None] == labels[None]
    like = same & ~torch.eye(len(points), dtype=torch.bool)
    gap = distance.where(like, -torch.inf).amax(dim=1) - distance.where(~same, torch.inf).amin(dim=1)
    counts = like.any(dim=1) & (~same).any(dim=1)
    return functional.relu(gap.where(counts, -torch.inf) + MARGIN).mean()


def texts(views: int | None = None, *, micro_batches: int = 4, rows: int = 4) -> list[MicroBatch]:
    """Return micro-batches of random texts, each with a kind; no two texts are the same.

    Args:
        views: Texts of a row, or None for a single one without a dimension of its own.
        micro_batches: How many.
        rows: Rows in each.
    """
    draw = torch.Generator().manual_seed(3)
    count = micro_batches * rows * (views or 1)
    several = torch.arange(count)[:, None] // VOCABULARY ** torch.arange(2)
    ids = torch.cat([several % VOCABULARY, torch.randint(VOCABULARY, (count, TIME - 2), generator=draw)], dim=1)
    each = (rows,) if views is None else (rows, views)
    ids = ids[torch.randperm(count, generator=draw)].view(micro_batches, *each, TIME)
    kinds = torch.randint(KINDS, (micro_batches, rows), generator=draw)
    return [{"input_ids": part, "labels": labels} for part, labels in zip(ids, kinds, strict=True)]


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a model that is the same in each call, and leave the random stream as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def _pairs(**options: object) -> Task:
    make = partial(seeded, partial(Encoder, **options))  # type: ignore[arg-type]
    return Task(make, texts(2), compares=in_batch_negatives, loss_form="mean")


def _labelled_texts(micro_batches: int = 4) -> list[MicroBatch]:
    """Micro-batches in which each position has a class."""
    draw = torch.Generator().manual_seed(4)
    return [
        {**part, "labels": torch.randint(VOCABULARY, part["input_ids"].shape, generator=draw)}
        for part in texts(micro_batches=micro_batches)
    ]


COUPLED: tuple[tuple[str, str, Task], ...] = (
    ("T8-in-batch-negatives", "each row is compared with all rows of the logical batch", _pairs()),
    (
        "T8-hard-triplets",
        "the farthest like and the nearest unlike row are looked for in the logical batch",
        Task(partial(seeded, Encoder), texts(), compares=hard_triplets, loss_form="mean"),
    ),
    (
        "T8-standardised",
        "a layer of the user's own that standardises sees the logical batch",
        Task(partial(seeded, StandardisedTagger), _labelled_texts(), meets=True),
    ),
    ("T8-dropout", "the same with dropout: one mask for each row, whatever is run twice", _pairs(drops="features")),
    ("T8-layer-drop", "the same with a coin of Python, which decides whether a layer is run", _pairs(drops="layer")),
    ("T8-batch-norm", "the same with batch norm in the encoder, over the logical batch as well", _pairs(norm=True)),
)
"""Name, what is right, and the task of each scene of trap 8 in one process."""

OVER_RANKS: tuple[tuple[str, str, Task], ...] = (
    (
        "T8x2-in-batch-negatives",
        "each row is compared with all rows of the logical batch, on whichever rank they are",
        Task(
            partial(seeded, Encoder), texts(2, micro_batches=8), compares=in_batch_negatives, loss_form="mean", ranks=2
        ),
    ),
    (
        "T8x2-standardised",
        "a layer that standardises sees the rows of both ranks",
        Task(partial(seeded, StandardisedTagger), _labelled_texts(8), meets=True, ranks=2),
    ),
)
"""The same over two ranks."""
