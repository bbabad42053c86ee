"""How do values of any shape and dtype travel between ranks? Tensors as bytes, side by side; numbers in words."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from wholebatch.core.tree import map_leaves
from wholebatch.engine.ranks.wire import Wire


def label_of(value: Any) -> Any:
    """Return what others have to know of a value before they get it: all of a number, shape and dtype of a tensor."""
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def in_words(tree: Any) -> Any:
    """Return what a message can hold: tensors in the memory of the host."""
    return map_leaves(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, tree)


def exchange(wire: Wire, values: Sequence[Any], labels: Sequence[Sequence[Any]], device: torch.device) -> list[Any]:
    """Return the values that all ranks bring, in the order of ranks, without graphs.

    Args:
        wire: Speaks to the others.
        values: Of this rank.
        labels: Of the values of each rank, by rank.
        device: Where the values are.
    """
    sizes = [[_nbytes(label) for label in each] for each in labels]
    longest = max(map(sum, sizes))
    own = torch.zeros(longest, dtype=torch.uint8, device=device)
    start = 0
    for value in values:
        if isinstance(value, Tensor):
            flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
            own[start : start + len(flat)] = flat
            start += len(flat)
    parcels = wire.side_by_side(own) if longest else [own] * wire.ranks
    found = []
    for parcel, labels_of_rank, sizes_of_rank in zip(parcels, labels, sizes, strict=True):
        starts = accumulate(sizes_of_rank, initial=0)
        for start, label, size in zip(starts, labels_of_rank, sizes_of_rank, strict=False):
            found.append(_unpacked(label, parcel[start : start + size]))
    return found


def _nbytes(label: Any) -> int:
    if not isinstance(label, tuple):
        return 0
    shape, dtype = label
    return int(torch.Size(shape).numel() * dtype.itemsize)


def _unpacked(label: Any, parcel: Tensor) -> Any:
    if not isinstance(label, tuple):
        return label
    shape, dtype = label
    return parcel.clone().view(dtype).reshape(shape)
