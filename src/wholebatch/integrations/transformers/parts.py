"""In which parts is a micro-batch looked at? Its rows, or its labels, in two parts that no other mean treats alike."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wholebatch.core.batch import LogicalBatch
from wholebatch.core.errors import SplitError
from wholebatch.integrations.transformers.objective import IGNORED


def pieces(rows: Sequence[Any], most: int) -> list[list[Any]]:
    """Return rows in pieces of so many at most, each from all over the batch."""
    number = -(-len(rows) // most)
    return [list(rows[start::number]) for start in range(number)]


def labels_of(micro_batch: Any) -> str | None:
    """Return under which name whole-numbered labels are."""
    for name in ("shift_labels", "labels"):
        labels = micro_batch.get(name) if isinstance(micro_batch, Mapping) else None
        if isinstance(labels, Tensor) and labels.ndim and not labels.is_floating_point():
            return name
    return None


def rows_of(micro_batch: Any) -> int | None:
    """Return the rows of a micro-batch, or None where its parts do not agree on them."""
    try:
        return LogicalBatch(micro_batch).rows
    except SplitError:
        return None


def of_classes(labels: Tensor, first: Tensor, second: Tensor, classes: int) -> Tensor:
    """Return labels of one class in the first part and of others in the second.

    Weights of classes show where the parts are of different ones, and the labels of a few rows may all be of one.
    """
    if classes < 2 or not bool(first.any()):
        return labels
    one = labels[first][0]
    places = torch.arange(labels.numel(), device=labels.device).reshape(labels.shape)
    other = (one + 1 + places % (classes - 1)) % classes
    return torch.where(first, one, torch.where(second, other.to(labels.dtype), labels))


def masked(micro_batch: Any, name: str, there: Tensor) -> dict[str, Any]:
    """Return a micro-batch with the labels of some places, and -100 elsewhere."""
    return {**micro_batch, name: micro_batch[name].masked_fill(~there, IGNORED)}


def halves(there: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """Return the places of labels in two parts of different sizes, so that no other mean comes to the same."""
    places = there.clone()
    if shifted:
        places[..., 0] = False
    found = places.flatten().nonzero().flatten()
    first = torch.zeros_like(places).flatten()
    first[found[: max(1, len(found) // 3)]] = True
    first = first.reshape(places.shape)
    return first, there & ~first


def first_row_and_rest(there: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places of labels in two parts: those of the first row, and the others."""
    first = there.clone()
    first[1:] = False
    return first, there & ~first
