"""Is a gradient that is taken inside a loss that of all rows? In one graph through all micro-batches it need not be.

A penalty on slopes, or rows that are moved against the loss, differentiate in the middle of a forward pass. What one
micro-batch gives by itself leads to its rows in two ways: directly, and through what meetings came to. On the second
way the other micro-batches give something as well, which is missing. What all of them give comes by a meeting, and is
the same in each of them.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from wholebatch.core.errors import MeetingError
from wholebatch.engine.meetings.call import Call
from wholebatch.engine.meetings.company import here


class Inner:
    """Looks at the gradients that micro-batches take through what they got from meetings, until `end`.

    Args:
        ranks: How many processes have micro-batches that meet.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._results: set[Any] = set()
        self._hooks: list[Any] = []
        self._times: Counter[tuple[int, int]] = Counter()
        self._first: dict[tuple[int, int], Tensor] = {}

    def watch(self, call: Call, result: Any) -> None:
        """Look at each gradient that is taken through what a meeting came to."""
        if isinstance(result, Tensor) and result.requires_grad and result.grad_fn is not None:
            self._results.add(result.grad_fn)
            look = partial(self._look, call, len(self._hooks))
            self._hooks.append(result.register_hook(look))  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Look no longer: what comes now is the gradient of the whole objective."""
        for each in self._hooks:
            each.remove()
        self._hooks.clear()
        self._results.clear()
        self._first.clear()

    def _look(self, call: Call, place: int, gradient: Tensor) -> None:
        """Raise an error if a gradient is that of one micro-batch.

        Raises:
            MeetingError: It is.
        """
        outputs, inputs = _running()
        if self._ranks > 1 and any(each.grad_fn not in self._results for each in inputs):
            raise MeetingError(
                f"A gradient is taken inside the loss, through {call}, where the micro-batches of {self._ranks} ranks "
                "meet: what the other ranks give is not here.",
                hint="train with such a penalty on one rank, or let layers look at each row for itself, as "
                "wb.convert_batch_norm(model) does, and take the gradient before rows are gathered.",
            )
        if _leads_to(outputs, inputs, self._results):
            raise refused(f"{call}: it would be that of one micro-batch, and the others give something there too")
        micro_batch = place, id(here())
        self._times[micro_batch] += 1
        once = place, self._times[micro_batch]
        if once not in self._first:
            self._first[once] = gradient.detach().clone()
        elif _differ(gradient.detach(), self._first[once]):
            raise refused(f"{call}: it would be that of one micro-batch, and another one in each of them")


def refused(through: str) -> MeetingError:
    """Return the error that a gradient which is taken inside the loss is not that of all rows, or stands in its way."""
    return MeetingError(
        f"A gradient is taken inside the loss, through {through}.",
        hint="take it of what all rows give, and keep the graph: torch.autograd.grad(wb.gather(y).sum(), x, "
        "create_graph=True); or let layers look at each row for itself, as wb.convert_batch_norm(model) does.",
    )


def _running() -> tuple[Iterable[Tensor], Iterable[Tensor]]:
    """Return what the backward pass differentiates that runs in this thread, and by what; nothing if that is unknown.

    PyTorch tells nobody: it is what the call holds that entered autograd's engine.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_engine_run_backward":
        frame = frame.f_back
    if frame is None:
        return (), ()
    outputs, rest = frame.f_locals.get("t_outputs", ()), frame.f_locals.get("args", ())
    return outputs, rest[3] if len(rest) > 3 else ()


def _leads_to(outputs: Iterable[Tensor], inputs: Iterable[Tensor], without: set[Any]) -> bool:
    """Return whether the graphs of some tensors lead to others on a way that comes by none of some steps."""
    leaves = {id(each) for each in inputs if each.is_leaf}
    inner = {(each.grad_fn, each.output_nr) for each in inputs if not each.is_leaf}
    waiting: list[tuple[Any, int]] = [(each.grad_fn, each.output_nr) for each in outputs]
    seen = set()
    while waiting:
        step, output = waiting.pop()
        if step is None or step in without:
            continue
        if (step, output) in inner or id(getattr(step, "variable", None)) in leaves:
            return True
        if step not in seen:
            seen.add(step)
            waiting += step.next_functions
    return False


def _differ(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return True
    scale = torch.maximum(one.abs().max(), other.abs().max()) if one.numel() else 0.0
    return bool(one.numel() and (one - other).abs().max() > torch.finfo(one.dtype).eps ** 0.5 * scale)
