"""One graph through all micro-batches, for meetings that feed each other.

Each meeting is one computation on what all micro-batches bring, in ordinary differentiable operations. So their graphs
become one, and a single backward pass runs it in the right order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wholebatch.core.split import Indices
from wholebatch.engine.baton import in_lockstep
from wholebatch.engine.meeting import Call, Order, combined
from wholebatch.engine.recomputing import Minutes


def run_joined(
    runs: Sequence[Callable[[], Any]],
    order: Order,
    *,
    device: torch.device,
    before: Callable[[int], None] = lambda _: None,
) -> tuple[list[Any], Minutes]:
    """Run micro-batches whose graphs become one.

    Args:
        runs: The forward pass of each micro-batch.
        order: Where their rows stand in the logical batch.
        device: Where the model is.
        before: Called with the number of a micro-batch before it goes on.

    Returns:
        What each forward pass returned, and the company for the backward pass, in which parts may be recomputed.
    """
    results: list[Any] = [None] * len(runs)
    minutes = Minutes()

    def meet(calls: Sequence[Call]) -> list[Any]:
        minutes.require_unchanged()
        with torch.enable_grad():
            result = combined(calls, [call.value for call in calls], order)
        if calls[0].once is not None:
            calls[0].once(result, [call.beside for call in calls])
        minutes.take(calls, result, lambda call: result if call.with_graph else _detached(result))
        return [result if call.with_graph else _detached(result) for call in calls]

    rows: Sequence[Indices | None] = order.cut if order.cut is not None else [None] * len(runs)
    in_lockstep(runs, rows, device=device, before=before, meet=meet, finish=results.__setitem__)
    minutes.require_unchanged()
    return results, minutes


def _detached(result: Any) -> Any:
    return result.detach() if isinstance(result, Tensor) else result
