"""Which positions does batch norm count? All, unless the model says that some are padding."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from wholebatch.core.errors import BatchNormError


class _Mask:
    """What is kept inside a block, and whether a layer has looked at it."""

    __slots__ = ("kept", "seen")

    def __init__(self, kept: Tensor | None) -> None:
        self.kept = kept
        self.seen = False


_mask: ContextVar[_Mask | None] = ContextVar("wholebatch mask of batch norm", default=None)


@contextmanager
def mask_batch_norm(kept: Tensor | None) -> Iterator[None]:
    """Let exact batch norm inside the block count only the positions that are kept.

    Rows of unequal length are padded, and what the padding holds is no value of any row: mean, variance and running
    statistics are those of the positions that count, over the whole logical batch. What does not count is normalised
    like the rest, and gets no gradient from the statistics. So neither the cut nor the width of the padding is seen.
    Layers in evaluation use what they have, masked or not.

    Args:
        kept: True where a position counts. Shape ``[rows]`` for whole rows, or ``[rows, positions, ...]`` as the
            layer's input ``[rows, channels, positions, ...]`` without its channels; for an input ``[rows * positions,
            channels]`` as well. None: all of them count again.

    Raises:
        BatchNormError: A layer's input does not have these positions, or no exact layer ran in the block.

    Example:
        >>> import torch
        >>> import wholebatch as wb
        >>> norm = wb.exact_batch_norm(torch.nn.BatchNorm1d(1, affine=False))
        >>> x = torch.tensor([[[1.0, 3.0, 9.0]], [[5.0, 9.0, 9.0]]])  # two rows, one channel, three positions
        >>> with mask_batch_norm(torch.tensor([[True, True, False], [True, False, False]])):
        ...     y = norm(x)
        >>> y[0, 0, :2] + y[1, 0, 0]
        tensor([0.0000, 1.2247])
        >>> norm.running_mean / norm.momentum
        tensor([3.])
    """
    _check_mask(kept)
    mask = _Mask(None if kept is None else kept.bool())
    token = _mask.set(mask)
    try:
        yield
    finally:
        _mask.reset(token)
    if kept is not None and not mask.seen:
        raise BatchNormError(
            "A mask was given, and no exact batch norm ran in its block: it would have changed nothing.",
            hint="make the layers exact with wb.exact_batch_norm(model); ordinary ones know no masks.",
        )


def _check_mask(kept: Any) -> None:
    if kept is not None and (not isinstance(kept, Tensor) or kept.is_floating_point() or kept.is_complex()):
        found = str(kept.dtype) if isinstance(kept, Tensor) else type(kept).__name__
        raise BatchNormError(
            f"A mask of {found} does not say which positions count.", hint="pass booleans: lengths > 0, tokens != 0."
        )


def kept_positions(x: Tensor) -> Tensor | None:
    """Return which positions of a layer's input count, in a shape that goes with it; None: all.

    Args:
        x: Shape ``[rows, channels, ...]``.
    """
    mask = _mask.get()
    if mask is None or mask.kept is None:
        return None
    mask.seen = True
    kept, positions = mask.kept, x.shape[2:]
    if kept.shape == x.shape[:1]:
        return kept.view(-1, 1, *(1,) * len(positions))
    if kept.shape == (len(x), *positions):
        return kept.unsqueeze(1)
    if x.ndim == 2 and kept.numel() == len(x):
        return kept.reshape(-1, 1)
    raise BatchNormError(
        f"A mask of shape {tuple(kept.shape)} does not go with the input {tuple(x.shape)} of a batch norm.",
        hint="pass [rows], or the input's shape without its channels; where a layer changes the number of positions, "
        "give those behind it a mask of their own.",
    )
