"""Images: a small convolutional network tells ten kinds of clothes apart.

The rows are 2,000 pictures of Fashion-MNIST, 28 by 28 pixels, and 500 for validation. Unless something else is asked
for, the network norms with GroupNorm, which looks at one picture at a time: batch norm would see where the batch was
cut.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everywhere

from wholebatch.engine.batchnorm import convert_batch_norm

PICTURES = Path(__file__).parent / "data" / "fashion_mnist_2000_500.npz"
KINDS = 10

Row: TypeAlias = tuple[Tensor, int]
"""A picture in grey, shape ``[28, 28]``, 0 to 255, and its kind."""

defaults: dict[str, Any] = {
    "logical_batch": "128 rows",
    "micro_batch": "16 rows",
    "epochs": 8,
    "lr": 3e-3,
}


@cache
def data(split: str) -> Sequence[Row]:
    """Return pictures with their kinds, 200 of each kind to train and 50 to validate."""
    names = {"train": ("xtr", "ytr"), "validation": ("xte", "yte")}[split]
    with np.load(PICTURES) as arrays:
        pictures, kinds = (torch.from_numpy(arrays[name]) for name in names)
    return [(picture, int(kind)) for picture, kind in zip(pictures, kinds, strict=True)]


def collate(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Return the pictures, shape ``[rows, 1, 28, 28]``, about -1 to 1, and their kinds, shape ``[rows]``."""
    pictures = torch.stack([picture for picture, _ in rows]).unsqueeze(1).float() / 127.5 - 1
    return pictures, torch.tensor([kind for _, kind in rows])


def loss(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy, averaged over the rows."""
    pictures, kinds = micro_batch
    return F.cross_entropy(model(pictures), kinds)


def measure(model: nn.Module, rows: Sequence[Row]) -> dict[str, float]:
    """Return the share of pictures whose kind is told rightly."""
    device = next(model.parameters()).device
    right = 0
    for start in range(0, len(rows), 100):
        pictures, kinds = collate(list(rows[start : start + 100]))
        right += int((model(pictures.to(device)).argmax(dim=1).cpu() == kinds).sum())
    return {"accuracy": right / len(rows)}


def model(batch_norm: str = "group") -> nn.Module:
    """Return two convolutions and a linear layer, 20,538 parameters.

    Args:
        batch_norm: ``"group"`` for group norm over 4 groups in its place; whatever else is said, it is batch norm.
    """
    network = nn.Sequential(
        *_convolution(1, 16),
        nn.MaxPool2d(2),
        *_convolution(16, 32),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, KINDS),
    )
    return convert_batch_norm(network, groups=4) if batch_norm == "group" else network


def _convolution(channels_in: int, channels: int) -> tuple[nn.Module, ...]:
    # The norm takes every constant away, so that the convolution needs none.
    convolution = nn.Conv2d(channels_in, channels, kernel_size=3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(channels), nn.ReLU()
