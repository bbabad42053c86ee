"""In which dtype does something compute? The coarsest one shows in every operation, also under autocast."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CoarsestDtype(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the coarsest rounding unit of what is computed inside the block.

    Attributes:
        eps: ``torch.finfo(dtype).eps`` of it; 0 where nothing was computed.

    Example:
        >>> with CoarsestDtype() as seen:
        ...     _ = torch.ones(2, dtype=torch.float64).to(torch.bfloat16)
        >>> seen.eps == torch.finfo(torch.bfloat16).eps
        True
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.eps = 0.0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and (each.is_floating_point() or each.is_complex()):
                self.eps = max(self.eps, torch.finfo(each.dtype).eps)
        return result
