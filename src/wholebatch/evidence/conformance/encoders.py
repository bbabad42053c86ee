"""What is trained where rows meet? Small encoders; those that leave something out at random remember what it was."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from wholebatch.evidence.conformance.models import VOCABULARY, WIDTH, Tagger
from wholebatch.evidence.conformance.task import Task

Drawn: TypeAlias = dict[tuple[int, ...], list[Tensor]]
"""What was kept of each text, by its tokens: shape ``[width]``, or ``[1]`` where a layer was left out; newest last."""


class Encoder(nn.Module):
    """Turns texts into points of length 1: the mean of their tokens, through two layers.

    Args:
        norm: Whether batch norm stands between the layers, over all texts of a batch.
        drops: What is left out at random in training: features, by the stream of PyTorch (dropout), or the whole second
            layer, by that of Python, once for all texts of a call (LayerDrop).

    Attributes:
        log_temperature: Of a loss that has a temperature; it is learned.
        drawn: What was kept, as it was drawn.
        replays: Which of the earlier draws are taken in place of new ones, by place in the list; None: draw.

    Shape:
        Input ``[rows, time]`` or ``[rows, views, time]``, output ``[rows, width]`` or ``[rows, views, width]``.
    """

    def __init__(self, *, norm: bool = False, drops: Literal["features", "layer"] | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(WIDTH, dtype=torch.float64) if norm else nn.Identity()
        self.hidden = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.head = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.log_temperature = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))
        self.drops = drops
        self.drawn: Drawn = {}
        self.replays: int | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        texts = input_ids.flatten(0, -2)
        points = self.norm(self.embedding(texts).mean(dim=-2))
        if self.drops == "layer" and self.replays is None:
            keeps = random.random() < 0.5  # as LayerDrop does it: one coin of Python for a call
            self._remember(texts, torch.full((len(texts), 1), float(keeps), dtype=torch.float64))
            points = points + torch.tanh(self.hidden(points)) if keeps else points
        else:
            points = points + torch.tanh(self.hidden(points)) * self._kept(texts)
        return functional.normalize(self.head(points), dim=-1).view(*input_ids.shape[:-1], WIDTH)

    def _kept(self, texts: Tensor) -> Tensor:
        if self.drops is None:
            return torch.ones((), dtype=torch.float64)
        if self.replays is not None:
            return torch.stack([self.drawn[tuple(text)][self.replays] for text in texts.tolist()])
        kept = functional.dropout(torch.ones(len(texts), WIDTH, dtype=torch.float64), 0.25)
        self._remember(texts, kept)
        return kept

    def _remember(self, texts: Tensor, kept: Tensor) -> None:
        for text, each in zip(texts.tolist(), kept, strict=True):
            self.drawn.setdefault(tuple(text), []).append(each)


def as_drawn(task: Task, model: nn.Module) -> Task:
    """Return a task with the random numbers that a run of it has drawn, those of its last pass.

    The random stream is the system's own business, and so is the order in which it is asked. What is right is then the
    update of the undivided batch *with what was left out of each row*, whatever that was.

    Args:
        task: What was asked; any task.
        model: What was trained.
    """
    return with_draws(task, model.drawn, -1) if isinstance(model, Encoder) and model.drawn else task


def with_draws(task: Task, drawn: Drawn, which: int) -> Task:
    """Return a task whose models take earlier draws, in place of new ones: the first, or the last (-1)."""

    def make_model(make: Callable[[], nn.Module] = task.make_model) -> nn.Module:
        model = make()
        assert isinstance(model, Encoder)
        model.drawn, model.replays = drawn, which
        return model

    return replace(task, make_model=make_model)


class Standardised(nn.Module):
    """Takes the mean of the batch away, and divides by its deviation; no weights, and no running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=0)
        return centred / (centred.square().mean(dim=0) + 1e-5).sqrt()


class StandardisedTagger(Tagger):
    """A tagger in which features are standardised over all positions of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.standardised: nn.Module = Standardised()

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.standardised(torch.tanh(self.embedding(input_ids)).flatten(0, 1))
        logits: Tensor = self.head(hidden).unflatten(0, input_ids.shape)
        return logits
