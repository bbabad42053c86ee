"""How do micro-batches wait for each other? Each in a thread of its own, and one of them runs at a time.

A thread keeps what is in flight when its micro-batch waits: the place in the user's code, grad mode, autocast, hooks.
They hand on a baton, so that the order is always the same and never two micro-batches compute at once.
"""

import contextvars
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import overrides
from torch.utils import _python_dispatch as dispatch

from wholebatch.core.errors import MeetingError
from wholebatch.core.split import Indices
from wholebatch.engine.meetings.call import Call, known_rows, without_value
from wholebatch.engine.meetings.company import is_recomputing, sit_down

STACKS = 2 << 30
"""Address space of all threads' stacks together, where that leaves each what it needs. Unit: bytes."""

LEAST_STACK, MOST_STACK = 2 << 20, 8 << 20
"""What a thread's stack may take at the least and at the most; memory is taken only as it is used. Unit: bytes."""

_stack_size = threading.Lock()


class _Ended(BaseException):
    """Ends a micro-batch because another one has failed."""


def in_lockstep(
    runs: Sequence[Callable[[], Any]],
    rows: Sequence[Indices | None],
    *,
    ranks: int,
    device: torch.device,
    before: Callable[[int], None],
    meet: Callable[[Sequence[Call]], Sequence[Any]],
    finish: Callable[[int, Any], None],
    after: Callable[[int], None] = lambda _: None,
) -> None:
    """Run some functions from meeting to meeting, in order and one at a time.

    Args:
        runs: One a micro-batch; what it calls meets the others through `wholebatch.engine.meetings.meeting`.
        rows: Where the rows of each stand in the logical batch; None: they are all.
        ranks: How many processes have micro-batches that meet.
        device: Where the model is.
        before: Called with the number of a micro-batch before it goes on.
        meet: Called with what each micro-batch brings to a meeting; returns what each of them gets.
        finish: Called with the number of a micro-batch and its result as soon as it is there.
        after: Called with the number of a micro-batch when it has come to a meeting, or has finished.

    Raises:
        MeetingError: The micro-batches do not meet at the same places.
        BaseException: What one of them, or a function above, raised. No thread is left.
    """
    surroundings = _Surroundings(device)
    back: queue.SimpleQueue[None] = queue.SimpleQueue()
    micro_batches = [_MicroBatch(run, own, ranks, surroundings, back) for run, own in zip(runs, rows, strict=True)]
    stack_size = min(MOST_STACK, max(LEAST_STACK, STACKS // len(micro_batches)))
    try:
        while True:
            for number, each in enumerate(micro_batches):
                before(number)
                each.go_on(stack_size)
                each.raise_error()
                _require_same_place(micro_batches, number)
                if each.is_done:
                    finish(number, each.take_result())
                after(number)
            if micro_batches[0].is_done:
                return
            calls = [each.take_call() for each in micro_batches]
            for each, answer in zip(micro_batches, meet(calls), strict=True):
                each.answer = answer
            del calls
    finally:
        _end(micro_batches)


def _end(micro_batches: Sequence["_MicroBatch"]) -> None:
    """End all threads: first the one that still runs, then those that wait. Ctrl-C does not leave any behind."""
    interrupt: KeyboardInterrupt | None = None
    for each in micro_batches:
        each.is_ending = True
    for each in sorted(micro_batches, key=lambda each: not each.is_running):
        while True:
            try:
                each.end()
                break
            except KeyboardInterrupt as error:
                interrupt = error
    if interrupt is not None:
        raise interrupt


def _require_same_place(micro_batches: Sequence["_MicroBatch"], number: int) -> None:
    first, this = micro_batches[0], micro_batches[number]
    if first.is_done and this.is_done:
        return
    if first.call is not None and this.call is not None and first.call.key == this.call.key:
        return
    raise MeetingError(
        f"The micro-batches of a window do not meet at the same places: micro-batch 0 {first.whereabouts}, and "
        f"micro-batch {number} {this.whereabouts}.",
        hint="let every micro-batch make the same meetings in the same order: take decisions that depend on its rows "
        "between meetings, and return None only after the last one.",
    )


class _MicroBatch:
    """A micro-batch in a thread. It is the company of the code that runs in it."""

    def __init__(
        self,
        run: Callable[[], Any],
        rows: Indices | None,
        ranks: int,
        surroundings: "_Surroundings",
        back: queue.SimpleQueue[None],
    ) -> None:
        self.ranks = ranks
        self._run = run
        self._rows = rows
        self._surroundings = surroundings
        self._back = back
        self._go: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._result: Any = None
        self._last: Call | None = None
        self.call: Call | None = None
        self.answer: Any = None
        self.is_running = False
        self.is_done = False
        self.is_ending = False

    def meet(self, call: Call) -> Any:
        if self.is_ending:
            raise _Ended
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise MeetingError(
                f"Micro-batches cannot meet inside of torch.func (grad, vmap, jvp and others): {call}.",
                hint="meet before or after what is transformed; take a gradient through a meeting with "
                "torch.autograd.grad(wb.gather(y).sum(), x, create_graph=True).",
            )
        if is_recomputing():  # the others would wait for this backward pass, and it for them
            raise MeetingError(
                f"A gradient is taken inside the loss, and what is recomputed for it would meet the others: {call}.",
                hint="let that part of the model run without activation checkpointing where a gradient is taken of it.",
            )
        self.call = call
        del call
        self._hand_back()
        self._go.get()
        if self.is_ending:
            raise _Ended
        answer, self.answer = self.answer, None
        return answer

    def own_rows(self) -> Indices | None:
        return known_rows(self._rows)

    @property
    def whereabouts(self) -> str:
        if self.call is not None:
            return f"meets at {self.call}"
        return f"ends after it met at {self._last}" if self._last is not None else "ends without meeting anybody"

    def go_on(self, stack_size: int) -> None:
        """Let the micro-batch run to its next meeting, or to its end."""
        self.is_running = True
        if self._thread is None:
            run = partial(contextvars.copy_context().run, self._live)
            self._thread = threading.Thread(target=run, name="wholebatch micro-batch", daemon=True)
            with _stack_size:
                usual = threading.stack_size(stack_size)
                try:
                    self._thread.start()
                finally:
                    threading.stack_size(usual)
        else:
            self._go.put(None)
        self._back.get()

    def take_call(self) -> Call:
        assert self.call is not None
        call, self.call = self.call, None
        self._last = without_value(call)
        return call

    def take_result(self) -> Any:
        result, self._result = self._result, None
        return result

    def raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error

    def end(self) -> None:
        """Wait for the end of the thread, wherever it is."""
        if self._thread is not None and self._thread.ident is not None:
            self._go.put(None)
            self._thread.join()
        self.call = self.answer = self._result = self._error = None

    def _live(self) -> None:
        try:
            with ExitStack() as stack:
                self._surroundings.enter(stack)
                sit_down(self)
                self._result = self._run()
        except _Ended:
            pass
        except BaseException as error:  # it is raised again in the thread that waits
            self._error = error
        self.is_done = True
        self._hand_back()

    def _hand_back(self) -> None:
        self.is_running = False
        self._back.put(None)


class _Surroundings:
    """What PyTorch keeps for each thread, as it is in the thread that starts the others."""

    def __init__(self, device: torch.device) -> None:
        self._grad = torch.is_grad_enabled()
        self._num_threads = torch.get_num_threads()
        kinds = {"cpu", device.type}
        self._autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]
        self._cache = torch.is_autocast_cache_enabled()
        self._function_modes = overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        self._dispatch_modes = dispatch._get_current_dispatch_mode_stack()
        self._hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self._module: Any = torch.get_device_module(device) if device.type != "cpu" else None
        self._stream = getattr(self._module, "current_stream", _nothing)()

    def enter(self, stack: ExitStack) -> None:
        """Make them so in this thread, until the end of the stack."""
        torch.set_num_threads(self._num_threads)  # BLAS and OpenMP look at a setting of each thread
        stack.enter_context(torch.set_grad_enabled(self._grad))
        for kind, dtype in self._autocast:
            stack.enter_context(torch.autocast(kind, dtype, cache_enabled=self._cache))
        for mode in self._function_modes:  # such as a default device; pushed, not entered anew
            overrides._push_mode(mode)  # type: ignore[no-untyped-call]
            stack.callback(overrides._pop_mode)
        for mode in self._dispatch_modes:
            dispatch._push_mode(mode)
            stack.callback(dispatch._pop_mode)
        if self._hooks is not None:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(*self._hooks))
        if self._stream is not None and hasattr(self._module, "set_stream"):
            self._module.set_stream(self._stream)  # and its device


def _nothing() -> None:
    """Devices without streams have this one."""
