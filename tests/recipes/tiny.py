"""A recipe small enough to train in a test: numbers of varying length and a linear model, in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 40


class Tiny:
    """Each row is a list of numbers, and the model learns their sum from their mean; every number is a target.

    Args:
        on_loss: Called with the number of the loss, from 1, before it is computed.
    """

    def __init__(self, on_loss: Callable[[int], None] | None = None) -> None:
        self.on_loss = on_loss
        self.losses = 0
        self.collated: list[int] = []
        self.modes: list[tuple[bool, bool]] = []

    def data(self, split: str) -> Sequence[Tensor]:
        generator = torch.Generator().manual_seed(0 if split == "train" else 1)
        return [
            torch.rand(1 + place * 7 % 12, dtype=torch.float64, generator=generator)
            for place in range(ROWS if split == "train" else 10)
        ]

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def collate(self, rows: list[Tensor]) -> Tensor:
        self.collated.append(len(rows))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)

    def loss(self, model: nn.Module, micro_batch: Tensor) -> tuple[Tensor, Tensor]:
        self.losses += 1
        self.modes.append((model.training, torch.is_grad_enabled()))
        if self.on_loss is not None:
            self.on_loss(self.losses)
        real = micro_batch >= 0
        error = model(micro_batch.unsqueeze(-1)).squeeze(-1) - 3 * micro_batch
        return (error.square() * real).sum(), real.sum()

    def length(self, row: Tensor) -> int:
        return len(row)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        halves = [list(layer.parameters()) for layer in (model[0], model[2])]
        return torch.optim.SGD([{"params": halves[0], "lr": 0.1}, {"params": halves[1], "lr": 0.2}])

    def measure(self, model: nn.Module, rows: Sequence[Tensor]) -> dict[str, float]:
        return {"rows_seen": len(rows), "training": float(model.training)}


def without(recipe: Any, *names: str) -> Any:
    """Return the same recipe without some of its functions."""

    class Lacking:
        def __getattr__(self, name: str) -> Any:
            if name in names:
                raise AttributeError(name)
            return getattr(recipe, name)

    return Lacking()
