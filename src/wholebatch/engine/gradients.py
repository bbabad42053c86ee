"""How large is a gradient? Its 2-norm, in 32 bits at least, whether it is dense or sparse."""

import torch
from torch import Tensor


def stored(gradient: Tensor) -> Tensor:
    """Return the numbers of a gradient; of a sparse one those that are stored, each place once."""
    return gradient.coalesce().values() if gradient.layout == torch.sparse_coo else gradient


def norm_of(gradient: Tensor) -> Tensor:
    """Return the 2-norm of a gradient, still on its device. Shape ``[]``.

    Example:
        >>> norm_of(torch.tensor([3.0, 4.0], dtype=torch.bfloat16))
        tensor(5.)
    """
    numbers = stored(gradient)
    wide = torch.float32 if numbers.element_size() < 4 else None
    norm: Tensor = torch.linalg.vector_norm(numbers, dtype=wide)
    return norm
