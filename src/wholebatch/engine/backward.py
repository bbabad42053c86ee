"""How does a backward pass begin? In autograd's engine, past the checks of what enters at the losses.

`torch.autograd.backward` looks at the shape and the kind of every gradient that enters. With cold caches that takes
some 30 us, as long as a small layer. What enters here was made from the losses themselves (`weighing.py`), so the
checks would find nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wholebatch.core.errors import LossError

_engine: Callable[..., Any] | None = getattr(torch.autograd.graph, "_engine_run_backward", None)


def run_backward(losses: Sequence[Tensor], roots: Sequence[Tensor]) -> None:
    """Add the gradients of some losses to the leaves that they came from.

    Args:
        losses: Where the pass begins.
        roots: What enters at each of them: of its shape, its dtype and its device.

    Raises:
        LossError: A backward pass has gone through the graph before.
    """
    try:
        if _engine is None or any(type(loss) is not Tensor for loss in losses):  # a subclass may have a way of its own
            torch.autograd.backward(losses, roots)
        else:
            _engine(tuple(losses), tuple(roots), False, False, (), allow_unreachable=True, accumulate_grad=True)
    except RuntimeError as error:
        if "through the graph a second time" not in str(error):
            raise
        raise LossError(
            "A backward pass has gone through the graph of this loss before, or through a part of it.",
            hint="leave backward() to the accumulator, and take it out of loss_fn; detach() what an earlier "
            "micro-batch left behind; add losses that share a graph up to one.",
        ) from error
