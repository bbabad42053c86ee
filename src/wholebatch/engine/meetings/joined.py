"""One graph through all micro-batches, for meetings that feed each other.

Each meeting is one computation on what all micro-batches bring, in ordinary differentiable operations. So their graphs
become one, and a single backward pass runs it in the right order.
"""

from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from wholebatch.engine.heap import keep_freed_blocks
from wholebatch.engine.meetings.baton import in_lockstep
from wholebatch.engine.meetings.belongings import Belongings
from wholebatch.engine.meetings.call import Call
from wholebatch.engine.meetings.draws import Passage, Stream
from wholebatch.engine.meetings.inner import Inner, refused
from wholebatch.engine.meetings.moving import Moving
from wholebatch.engine.meetings.reach import Reach
from wholebatch.engine.meetings.recomputing import Minutes


def run_joined(
    runs: Sequence[Callable[[], Any]],
    reach: Reach,
    *,
    model: nn.Module,
    device: torch.device,
    moving: Moving,
    before: Callable[[int], None] = lambda _: None,
    inner: Inner | None = None,
) -> tuple[list[Any], Minutes]:
    """Run micro-batches whose graphs become one.

    Args:
        runs: The forward pass of each micro-batch.
        reach: Those that meet.
        model: What they run. On an accelerator its weights stay there; what else is saved for the backward pass waits
            in the host's memory, unless the user's own hooks take care of it.
        device: Where it is.
        moving: Takes what meetings do once.
        before: Called with the number of a micro-batch before it goes on.
        inner: Looks at gradients that a forward pass takes by itself.

    Returns:
        What each forward pass returned, and the company for the backward pass, in which parts may be recomputed.

    Raises:
        MeetingError: A forward pass takes a gradient through the graph of all, and lets it go, or `inner` refuses it.
    """
    if device.type in _OFFLOADING:
        weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
        runs = [partial(_offloading, run, weights, device) for run in runs]
    elif device.type == "cpu":
        keep_freed_blocks()
    results: list[Any] = [None] * len(runs)
    minutes, belongings = Minutes(reach.ranks), Belongings(model)
    stream = Stream(device)
    passages = [Passage(stream), Passage(stream)]  # the meeting that they come from, and the one that they go to

    def meet(calls: Sequence[Call]) -> list[Any]:
        minutes.require_unchanged()
        with torch.enable_grad():
            brought = reach.hear(calls, [call.value for call in calls], graph=True)
            result = calls[0].combine(brought.values, brought.beside, reach.order)
        moving.once(calls[0], result, brought.beside)
        if inner is not None:
            inner.watch(calls[0], result)
        share = _sharing(result)
        minutes.take(calls, result, share, passages[1])
        passages[:] = passages[1], Passage(stream)
        return [share(call) for call in calls]

    def go_on(number: int) -> None:
        before(number)
        belongings.go_on(number)
        passages[0].go_on()

    def come(number: int) -> None:
        belongings.come(number)
        passages[1].come()

    try:
        in_lockstep(
            [partial(_in_one_thread, run) for run in runs],
            reach.rows,
            ranks=reach.ranks,
            device=device,
            before=go_on,
            meet=meet,
            finish=results.__setitem__,
            after=come,
        )
    except RuntimeError as error:
        if "through the graph a second time" not in str(error):
            raise
        raise refused("what looks at the whole logical batch, and uses up the graph of all") from error
    finally:
        if inner is not None:
            inner.end()
    minutes.require_unchanged()
    reach.end()
    return results, minutes


def _in_one_thread(run: Callable[[], Any]) -> Any:
    """Run a forward pass whose own backward passes run in its thread, where it is known whose they are."""
    with torch.autograd.set_multithreading_enabled(False):
        return run()


def _sharing(result: Any) -> Callable[[Call], Any]:
    """Return what gives each micro-batch the result of a meeting.

    What comes back from all of them is summed by autograd, where 16 bits are too few: so it is summed in 32.
    """
    if not isinstance(result, Tensor):
        return lambda _: result
    if not result.requires_grad or result.element_size() >= 4 or not result.is_floating_point():
        return lambda call: result if call.with_graph else result.detach()
    with torch.enable_grad():
        wide = result.float()
    return lambda call: _Narrow.apply(wide, result) if call.with_graph else result.detach()  # type: ignore[no-untyped-call]


class _Narrow(torch.autograd.Function):
    """A tensor of 32 bits as one of 16 that is there already."""

    @staticmethod
    def forward(_ctx: Any, _wide: Tensor, narrow: Tensor) -> Tensor:
        return narrow.detach()

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].float(), None


_OFFLOADING = {"cuda", "xpu"}
"""Devices with a memory of their own, between which and the host's copies run beside the computation."""


def _offloading(run: Callable[[], Any], weights: Container[int], device: torch.device) -> Any:
    """Run a forward pass whose saved tensors wait in the host's memory."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return run()
    with saved_tensors_hooks(*offload_hooks(weights, device)):
        return run()


def offload_hooks(
    weights: Container[int], device: torch.device
) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """Return what packs a saved tensor into the host's memory, and what brings it back. Nothing waits for a copy.

    Args:
        weights: Where the storages begin that stay where they are.
        device: Where the model is.
    """
    pinned = save_on_cpu(pin_memory=device.type != "cpu", device_type=device.type)

    def pack(tensor: Tensor) -> Any:
        if tensor.device.type != device.type or tensor.untyped_storage().data_ptr() in weights:
            return tensor
        return pinned.pack_hook(tensor)

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else pinned.unpack_hook(packed)

    return pack, unpack
