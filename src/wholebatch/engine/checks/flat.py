"""What are the gradients of some parameters, as one stretch of numbers?"""

from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor, nn


def flat_gradient(parameters: Iterable[nn.Parameter], sample: int | None = None) -> Tensor:
    """Return the gradients of some parameters, one after the other, on the CPU.

    They keep the precision that they have, and have 32 bits at least: to widen all of a large model's would take longer
    than to compute them.

    Args:
        parameters: Whose ``.grad`` is taken; None is zero.
        sample: At most so many entries of each, evenly spaced; None: all.

    Returns:
        A copy. Shape ``[entries]``; a complex entry counts as two.
    """
    parameters = list(parameters)
    dtypes = (parameter.dtype.to_real() for parameter in parameters)
    widest = reduce(torch.promote_types, dtypes, torch.float32)
    return torch.cat([_entries(parameter, num_entries(parameter, sample), widest) for parameter in parameters])


def take_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Take the gradients of some parameters out of ``.grad``, as they are, but for where they are: on the CPU.

    What is there and dense is not copied, unless it is a view of something else, which may be written again: DDP has
    such. An accelerator keeps its memory for the next pass.

    Args:
        parameters: Whose ``.grad`` is None afterwards; where it was so before, the gradient is zero.

    Returns:
        One for each parameter. Shape of each: ``[entries]``; a complex entry counts as two.
    """
    taken = []
    for parameter in parameters:
        entries = _flat(parameter)
        if entries is None:
            entries = torch.zeros(num_entries(parameter, None), dtype=parameter.dtype.to_real())
        elif parameter.grad is not None and parameter.grad._is_view():
            entries = entries.clone()
        taken.append(entries.cpu())
        parameter.grad = None
    return taken


def num_entries(parameter: nn.Parameter, sample: int | None) -> int:
    """Return how many entries of a parameter's gradient are kept, `sample` at most; a complex one counts as two."""
    entries = parameter.numel() * (2 if parameter.is_complex() else 1)
    return min(entries, sample) if sample is not None else entries


def _entries(parameter: nn.Parameter, size: int, dtype: torch.dtype) -> Tensor:
    flat = _flat(parameter)
    if flat is None:
        return torch.zeros(size, dtype=dtype)
    return flat[:: max(1, flat.numel() // max(1, size))][:size].to("cpu", dtype)


def _flat(parameter: nn.Parameter) -> Tensor | None:
    """The gradient of a parameter as one stretch of real numbers, None where there is none."""
    if parameter.grad is None:
        return None
    grad = parameter.grad.detach()
    grad = grad if grad.layout == torch.strided else grad.to_dense()
    return (torch.view_as_real(grad) if grad.is_complex() else grad).flatten()
