"""Small models and losses whose rows depend on each other, with what they are trained on."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import wholebatch as wb
from menagerie import Animal, numbers, whole_numbers
from properties import gradient_of, relative_error, undivided


def pairs(rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Two views of each row, and a length that no order of rows follows."""
    return {
        "a": numbers(rows, 6, dtype=dtype),
        "b": numbers(rows, 6, dtype=dtype, seed=1),
        "length": whole_numbers(9, rows, seed=2) + 1,
        "label": whole_numbers(3, rows, seed=3),
    }


def length_of(row: dict[str, Tensor]) -> int:
    return int(row["length"])


CUTS = {
    "rows": wb.Rows(4),
    "single rows": wb.Rows(1),
    "ragged": wb.Rows(7),
    "by length": wb.Tokens(18, length=length_of),
}
"""Ways to cut a batch of eleven rows."""

ROWS = 11
"""Of a batch."""


class Towers(nn.Module):
    """One encoder for both sides, with dropout, and a temperature that learns."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 8))
        self.log_temperature = nn.Parameter(torch.tensor(-1.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.encoder(x), dim=1)


def two_sided(model: Any, batch: Any) -> Tensor:
    """In-batch negatives in both directions, and a term of each row alone."""
    left, right = model(batch["a"]), model(batch["b"])
    temperature = model.log_temperature.exp()
    return wb.losses.info_nce(left, right, temperature=temperature, symmetric=True) + 0.1 * F.mse_loss(left, right)


def two_sided_by_hand(model: Any, batch: Any) -> Tensor:
    """The same by gather, with something between the two meetings, and after them a weight that is used again."""
    left = model(batch["a"])
    everyone = wb.gather(left)
    right = model(batch["b"])
    mine = wb.own_rows(left)
    scale = torch.exp(-model.log_temperature)
    loss = F.cross_entropy(right @ everyone.T * scale, mine)
    loss = loss + F.cross_entropy(left @ wb.gather(right).T * scale, mine)
    return loss / 2 + 0.1 * (left - right).square().sum(1).mean()


def without_gather(model: Any, batch: Any) -> Tensor:
    """The mistake: the rows of the micro-batch are taken for all."""
    left, right = model(batch["a"]), model(batch["b"])
    logits = left @ right.T / model.log_temperature.exp()
    mine = torch.arange(len(left))
    both = (F.cross_entropy(logits, mine) + F.cross_entropy(logits.T, mine)) / 2
    return both + 0.1 * F.mse_loss(left, right)


def triplets(model: Any, batch: Any) -> Tensor:
    return wb.losses.batch_hard_triplet(model(batch["a"]), batch["label"], margin=0.5)


def with_hard_negatives(model: Any, batch: Any) -> Tensor:
    negatives = torch.stack([model(batch["b"].roll(1, 1)), model(batch["b"].roll(2, 1))], dim=1)
    return wb.losses.info_nce(model(batch["a"]), model(batch["b"]), negatives=negatives)


class Experts(nn.Module):
    """A mixture of experts, of which each row takes the best."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 4)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = self.router(x).softmax(-1)
        best, chosen = probabilities.max(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        return best.unsqueeze(1) * outputs[torch.arange(len(x)), chosen], probabilities


def balanced(model: Any, batch: Any) -> Tensor:
    output, probabilities = model(batch["a"])
    return F.mse_loss(output, batch["b"]) + 0.3 * wb.losses.load_balancing(probabilities)


def balanced_once(model: Any, batch: Any) -> tuple[Tensor, int, Tensor]:
    output, probabilities = model(batch["a"])
    error = (output - batch["b"]).square().mean(1)
    return error.sum(), len(error), 0.3 * wb.losses.load_balancing(probabilities)


def standardised(model: Any, batch: Any) -> Tensor:
    """Statistics of the batch by hand: the second meeting needs what came out of the first."""
    x = model.encoder(batch["a"])
    rows = wb.sum_over_batch(len(x))
    centred = x - wb.sum_over_batch(x.sum(0)) / rows
    covariance = wb.sum_over_batch(centred.T @ centred) / rows
    off_diagonal = covariance - torch.diag(covariance.diag())
    return off_diagonal.square().sum() + F.mse_loss(model(batch["a"]), model(batch["b"]))


def twice_gathered(model: Any, batch: Any) -> Tensor:
    """Two gathers that depend on each other: rows look at all rows, and what they see is compared with all."""
    x = model(batch["a"])
    everyone = wb.gather(x)
    seen = (x @ everyone.T).softmax(1) @ everyone
    return F.cross_entropy(model(batch["b"]) @ wb.gather(seen).T, wb.own_rows(seen))


def images(rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "x": 3 + 2 * numbers(rows, 3, 8, 8, dtype=dtype),
        "y": whole_numbers(5, rows),
        "length": whole_numbers(9, rows, seed=2) + 1,
    }


class Residual(nn.Module):
    """A block of a ResNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.second(F.relu(self.norm1(self.first(x))))))


def resnet() -> nn.Module:
    blocks = [Residual(6) for _ in range(8)]
    stem = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))


def mobilenet() -> nn.Module:
    """Inverted residuals: wide, depthwise, narrow; batch norm after each, with three kinds of momentum."""

    def block(width: int, momentum: float | None) -> nn.Module:
        wide = 3 * width
        return nn.Sequential(
            nn.Conv2d(width, wide, 1, bias=False),
            nn.BatchNorm2d(wide, momentum=momentum),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide, momentum=momentum, affine=False),
            nn.ReLU6(),
            nn.Conv2d(wide, width, 1, bias=False),
            nn.BatchNorm2d(width, momentum=momentum, track_running_stats=momentum is not None),
        )

    blocks = [block(3, 0.1), block(3, 0.01), block(3, None)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(3 * 64, 5))


def normed_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 6)
    )


def classify(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def match(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch["a"]), batch["b"])


class NormedTowers(Towers):
    """Batch norm and in-batch negatives in one model; the layer runs twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder.insert(1, nn.BatchNorm1d(16))


def in_tiles(model: Any, batch: Any) -> Tensor:
    temperature = model.log_temperature.exp()
    left, right = model(batch["a"]), model(batch["b"])
    return wb.losses.info_nce(left, right, temperature=temperature, symmetric=True, negatives=right.roll(1, 1), tile=2)


MEETING = {
    "two-sided": Animal(Towers, pairs, two_sided),
    "two-sided by hand": Animal(Towers, pairs, two_sided_by_hand),
    "hard negatives": Animal(Towers, pairs, with_hard_negatives),
    "in tiles": Animal(Towers, pairs, in_tiles),
    "triplets": Animal(Towers, pairs, triplets),
    "balanced experts": Animal(Experts, pairs, balanced),
    "balanced experts, once": Animal(Experts, pairs, balanced_once),
}
"""Meetings that do not feed each other."""

FEEDING = {
    "standardised": Animal(Towers, pairs, standardised),
    "twice gathered": Animal(Towers, pairs, twice_gathered),
}
"""Meetings that need the gradient of earlier ones."""

NORMED = {
    "ResNet": Animal(resnet, images, classify),
    "MobileNet": Animal(mobilenet, images, classify),
    "MLP": Animal(normed_mlp, pairs, match),
    "normed towers": Animal(NormedTowers, pairs, two_sided),
}
"""Models with batch norm."""


class LooksAround(nn.Module):
    """Meets between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        return self.after(torch.tanh(h - wb.gather(h).mean(0)))


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))


def error_of(animal: Animal, make_update: Any, dtype: torch.dtype = torch.float64) -> float:
    """How far the gradient of an update is from that of the undivided batch."""
    batch = animal.batch(ROWS, dtype)
    return relative_error(
        gradient_of(animal, make_update, batch, dtype=dtype), gradient_of(animal, undivided(animal), batch, dtype=dtype)
    )
