"""What do micro-batches bring to a meeting, and what do they get? Collectives for any layer and any loss.

Micro-batches are virtual ranks. What a model does across devices with collectives it does across micro-batches with the
same words: each brings what it has, and each gets what all brought.
"""

from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from wholebatch.core.errors import MeetingError
from wholebatch.engine.meetings.call import Order
from wholebatch.engine.meetings.company import here, meet

Summed = TypeVar("Summed", Tensor, int, float)


def gather(x: Tensor) -> Tensor:
    """Return the rows of the whole logical batch, of which `x` has those of this micro-batch.

    They stand in the order in which the batch was given, however it was cut, and gradients flow back to every row's
    micro-batch. Outside an accumulator, in evaluation, and where a batch is not cut, the rows of `x` are all rows.

    Args:
        x: One entry a row of the micro-batch, on the first dimension; the other dimensions are the same in every
            micro-batch. Shape ``[rows, ...]``.

    Returns:
        Shape ``[rows of the logical batch, ...]``. To be read, not changed in place.

    Raises:
        MeetingError: Another micro-batch does not come to this place, shapes do not fit, or micro-batches come one by
            one, as in a window of your own.

    Example:
        >>> import wholebatch as wb
        >>> model = torch.nn.Linear(3, 2)
        >>> def loss_fn(model, x):
        ...     mine = model(x)
        ...     everyone = wb.gather(mine)
        ...     return torch.nn.functional.cross_entropy(mine @ everyone.T, wb.own_rows(mine))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> accumulator = wb.Accumulator(model, optimizer, loss_fn, micro_batch=wb.Rows(2))
        >>> accumulator.step(torch.randn(6, 3)).micro_batches
        3
    """
    return meet("wb.gather", x, rows_in_order)  # type: ignore[no-any-return]


def sum_over_batch(x: Summed) -> Summed:
    """Return the sum of `x` over all micro-batches of the logical batch.

    Any statistic that is a sum over rows becomes that of the whole batch: sum it over the rows that are here, then over
    the batch. Gradients flow back to every micro-batch. Outside an accumulator it is `x`.

    Args:
        x: A tensor of the same shape in every micro-batch, or a number, such as the rows that are here.

    Returns:
        The sum, in the dtype of `x`; a bool is counted.

    Raises:
        MeetingError: As for `gather`.

    Example:
        >>> import wholebatch as wb
        >>> x = torch.tensor([1.0, 2.0, 6.0])
        >>> wb.sum_over_batch(x.sum()) / wb.sum_over_batch(len(x))  # the mean of the whole batch, wherever it is cut
        tensor(3.)
    """
    return meet("wb.sum_over_batch", x, _sum)  # type: ignore[no-any-return]


def own_rows(x: Tensor) -> Tensor:
    """Return which of the gathered rows are those of this micro-batch: the places of `x` in ``wb.gather(x)``.

    Args:
        x: What is gathered, or anything else with one entry a row of the micro-batch; only its length and device
            matter.

    Returns:
        Places, in the order of `x`; shape ``[rows]``, int64, on the device of `x`.

    Raises:
        MeetingError: `x` is no tensor or has not one entry a row, or nobody knows how many rows a micro-batch has.

    Example:
        >>> import wholebatch as wb
        >>> wb.own_rows(torch.zeros(3, 8))
        tensor([0, 1, 2])
    """
    given: Any = x
    if not isinstance(given, Tensor) or given.ndim == 0:
        raise _no_rows("wb.own_rows", given)
    company = here()
    own = company.own_rows() if company is not None else None
    if own is None:
        return torch.arange(len(x), device=x.device)
    if len(own) != len(x):
        raise _wrong_rows("wb.own_rows", len(x), len(own))
    if isinstance(own, range):
        return torch.arange(own.start, own.stop, device=x.device)
    return torch.tensor(own, device=x.device)


def rows_in_order(values: Sequence[Any], _beside: Sequence[Any], order: Order) -> Tensor:
    """Return the rows of all micro-batches in the order of the logical batch: what `gather` comes to."""
    first = values[0]
    if not isinstance(first, Tensor) or first.ndim == 0:
        raise _no_rows("wb.gather", first)
    for number, value in enumerate(values):
        if order.cut is not None and len(value) != len(order.cut[number]):
            raise _wrong_rows("wb.gather", len(value), len(order.cut[number]))
        if value.shape[1:] != first.shape[1:] or value.dtype != first.dtype:
            raise _misfit("wb.gather", number, value, first, "each row to the same shape (pool or pad it)")
    return values[0] if len(values) == 1 else order.sort(torch.cat(list(values)))


def _sum(values: Sequence[Any], _beside: Sequence[Any], _order: Order) -> Any:
    first = values[0]
    if isinstance(first, Real):
        return sum(values)
    if not isinstance(first, Tensor):
        raise MeetingError(
            f"wb.sum_over_batch was given a {type(first).__name__}, which cannot be added up.",
            hint="pass a tensor or a number; several of them one by one.",
        )
    for number, value in enumerate(values):
        if value.shape != first.shape or value.dtype != first.dtype:
            raise _misfit("wb.sum_over_batch", number, value, first, "x to a sum over the rows that are here")
    wide = torch.int64 if first.dtype == torch.bool else first.dtype
    if first.is_floating_point() and first.element_size() < 4:
        wide = torch.float32
    total = first.to(wide)
    for value in values[1:]:
        total = total + value.to(wide)
    return total if first.dtype == torch.bool else total.to(first.dtype)


def _no_rows(kind: str, found: Any) -> MeetingError:
    said = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"type {type(found).__name__}"
    return MeetingError(
        f"{kind} was given something of {said}, which has no rows.",
        hint="pass a tensor with one entry a row, [rows, ...]; add up anything else with wb.sum_over_batch(x).",
    )


def _wrong_rows(kind: str, entries: int, rows: int) -> MeetingError:
    return MeetingError(
        f"{kind} was given {entries} entries in a micro-batch of {rows} rows.",
        hint="gather one entry a row, [rows, ...]; several views of a row one by one, or as x.view(rows, views, ...), "
        "and what is summed over rows with wb.sum_over_batch(x).",
    )


def _misfit(kind: str, number: int, value: Tensor, first: Tensor, to_do: str) -> MeetingError:
    return MeetingError(
        f"{kind} was given {value.dtype} of shape {tuple(value.shape)} in micro-batch {number}, and {first.dtype} of "
        f"shape {tuple(first.shape)} in micro-batch 0.",
        hint=f"bring {to_do} before they meet, in the same dtype.",
    )
