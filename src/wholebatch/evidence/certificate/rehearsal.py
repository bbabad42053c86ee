"""What does a user's own step do with a window? It is run on the user's model, watched, and undone."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import SGD

from wholebatch.core.errors import ConfigError
from wholebatch.engine.checks.flat import flat_gradient
from wholebatch.engine.device import modules
from wholebatch.evidence.certificate.lines import Effect, LineWatch, PlannedFailureError
from wholebatch.evidence.certificate.schedules import Count, Schedule, counted
from wholebatch.evidence.certificate.source import Place

StepFn: TypeAlias = Callable[..., object]
"""``step(model, optimizer, micro_batches)``, or with a further argument that has ``sched`` in its name."""

LR = 2.0**-20
"""The learning rate of a rehearsal: so small that a second step starts from nearly the same weights."""


@dataclass(slots=True)
class Rehearsal:
    """What a step did with one window.

    Attributes:
        gradient: What the optimizer was given, added up over its steps. Shape ``[entries]``.
        incoming: What the backward passes brought, added up in float32 or wider; of wide weights only if it was
            watched. Shape ``[entries]``.
        in_16_bits: The same, rounded to 16 bits after each addition; of wide weights only if it was watched.
        rounded_once: `incoming`, rounded to 16 bits, beside `in_16_bits`.
        brought: The same for each backward pass, if it was watched.
        passes: Backward passes.
        arrivals: Gradients that arrived at a parameter.
        steps: After how many backward passes the optimizer stepped, for each time.
        schedule_steps: How often a schedule was stepped, the one that was stepped most often.
        moved: Whether weights were changed, where the optimizer never stepped.
        failed: Whether the failure was raised that was planned.
        escaped: The exception that left the step after that, if one did.
        effects: What each line did to the gradients, if it was watched.
        handler: The line that dealt with the planned failure, if it was watched.
    """

    gradient: Tensor
    incoming: Tensor
    in_16_bits: Tensor | None = None
    rounded_once: Tensor | None = None
    brought: list[Tensor] = field(default_factory=list)
    passes: int = 0
    arrivals: int = 0
    steps: list[int] = field(default_factory=list)
    schedule_steps: int = 0
    moved: bool = False
    failed: bool = False
    escaped: Exception | None = None
    effects: list[Effect] = field(default_factory=list)
    handler: Place | None = None


class Stage:
    """The user's model, on which steps are run and undone.

    Args:
        model: The module. Its gradients are used up.
        step: The user's step.
        roll_back: Puts back what a window has changed in the model's buffers.

    Raises:
        ConfigError: The step cannot be called with what it gets.
    """

    def __init__(self, model: nn.Module, step: StepFn, roll_back: Callable[[], None]) -> None:
        self._model = model
        self._step = step
        self._roll_back = roll_back
        self._takes = _arguments(step)
        self._weights = [(each, each.data, each.detach().clone(), each.requires_grad) for each in model.parameters()]
        self._parameters = [each for each, _, _, requires_grad in self._weights if requires_grad]
        self._hooks = [tuple(hooks) for hooks in self._all_hooks()]

    def run(
        self, micro_batches: Sequence[Any], *, loud: float = 1.0, fail_at: int | None = None, watch: bool = False
    ) -> Rehearsal:
        """Run the step on a window, and put weights, buffers and modes back.

        Args:
            micro_batches: The window.
            loud: What every gradient is multiplied by as it arrives.
            fail_at: At which arrival of a gradient to run out of memory, from 1; None: never.
            watch: Whether to look what each line does.

        Raises:
            Exception: What the step raised, unless a failure was planned.
        """
        for parameter in self._parameters:
            parameter.grad = None
        optimizer = SGD(self._parameters, lr=LR)
        recorder = _Recorder(self._parameters, optimizer, loud, fail_at, watch)
        found = recorder.found
        modes = [(module, module.training) for module in modules(self._model)]
        try:
            with recorder.recording(), counted(recorder.scheduled), recorder.watch or nullcontext():
                self._call(list(micro_batches), optimizer, Schedule(recorder.scheduled, LR))
        except Exception as error:
            if not found.failed:
                raise
            found.escaped = error
        finally:
            if not found.steps:
                found.moved = any(not torch.equal(parameter, before) for parameter, _, before, _ in self._weights)
            self._restore(modes)
        return recorder.end()

    def _call(self, micro_batches: list[Any], optimizer: SGD, schedule: Schedule) -> None:
        more = {self._takes: schedule} if self._takes else {}
        with torch.enable_grad():
            self._step(self._model, optimizer, micro_batches, **more)

    def _all_hooks(self) -> list[dict[int, Any]]:
        return [
            hooks if hooks is not None else {}
            for parameter in self._parameters
            for hooks in (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
        ]

    def _restore(self, modes: list[tuple[nn.Module, bool]]) -> None:
        with torch.no_grad():
            for parameter, data, before, requires_grad in self._weights:
                parameter.data = data
                parameter.copy_(before)
                parameter.requires_grad_(requires_grad)
        for hooks, there in zip(self._all_hooks(), self._hooks, strict=True):
            for hook in set(hooks).difference(there):  # a step that memory ended has not taken off its own
                del hooks[hook]
        for module, mode in modes:
            module.training = mode
        self._roll_back()  # the random streams go on: other draws show what depends on them


class _Recorder:
    """Hooks on the weights and on the optimizer that note what happens."""

    def __init__(
        self, parameters: list[nn.Parameter], optimizer: SGD, loud: float, fail_at: int | None, watch: bool
    ) -> None:
        self._parameters = parameters
        self._optimizer = optimizer
        self._loud = loud
        self._fail_at = fail_at
        self._arrived = [0] * len(parameters)
        self._sums: list[Tensor | None] = [None] * len(parameters)
        narrow = [_is_narrow(parameter.dtype) for parameter in parameters]
        self._sixteen = [each or watch for each in narrow] if any(narrow) or watch else []
        self._narrow_sums: list[Tensor | None] = [None] * len(parameters)
        self._brought: list[list[Tensor | None]] = []
        nothing = torch.zeros(0, dtype=torch.float64)
        self.found = Rehearsal(nothing, nothing)
        self.watch = LineWatch(parameters, lambda: self.found.passes) if watch else None
        self._schedules = Count()

    @contextmanager
    def recording(self) -> Iterator[None]:
        handles = [
            parameter.register_hook(partial(self._arrive, place))  # type: ignore[no-untyped-call]
            for place, parameter in enumerate(self._parameters)
        ]
        handles.append(self._optimizer.register_step_post_hook(self._stepped))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def end(self) -> Rehearsal:
        if self.watch is not None:
            self.found.effects, self.found.handler = self.watch.effects, self.watch.handler
        if not self.found.steps and self.found.escaped is None:
            self.found.gradient = torch.zeros_like(flat_gradient(self._parameters))
        self.found.incoming = self._flat(self._sums) if self._sixteen else torch.zeros(0, dtype=torch.float64)
        self.found.brought = [self._flat(each) for each in self._brought]
        if self._sixteen:
            pairs = list(zip(self._sums, self._narrow_sums, strict=True))
            self.found.in_16_bits = self._flat([wide if narrow is None else narrow for wide, narrow in pairs])
            self.found.rounded_once = self._flat(
                [wide if narrow is None or wide is None else wide.to(narrow.dtype) for wide, narrow in pairs]
            )
        return self.found

    def _arrive(self, place: int, gradient: Tensor) -> Tensor | None:
        self.found.arrivals += 1
        if self.found.arrivals == self._fail_at:
            self.found.failed = True
            raise PlannedFailureError(
                "CUDA out of memory. Tried to allocate 2.00 GiB (Not really: wb.verify looks what the step does then.)"
            )
        self._arrived[place] += 1
        if self._arrived[place] > self.found.passes:
            self.found.passes = self._arrived[place]
            if self.watch is not None:
                self._brought.append([None] * len(self._parameters))
        louder = gradient.detach() * self._loud if self._loud != 1.0 else None
        if self._sixteen:
            self._add_up(place, gradient if louder is None else louder)
        return louder

    def _add_up(self, place: int, louder: Tensor) -> None:
        with torch.no_grad():
            dense = louder.detach().to_dense() if louder.layout != torch.strided else louder.detach()
            before = self._sums[place]
            self._sums[place] = _wide(dense) if before is None else before.add_(dense)
            if self._sixteen[place] and not dense.is_complex():
                term = dense.to(dense.dtype if _is_narrow(dense.dtype) else torch.bfloat16)
                narrow = self._narrow_sums[place]
                self._narrow_sums[place] = term.clone() if narrow is None else narrow.add_(term)
            if self.watch is not None:
                self._brought[self._arrived[place] - 1][place] = _wide(dense)

    def _stepped(self, *_arguments: object) -> None:
        gradient = flat_gradient(self._parameters)
        self.found.gradient = gradient if not self.found.steps else self.found.gradient + gradient
        self.found.steps.append(self.found.passes)
        if self.watch is not None:
            self.watch.note("stepped")

    def scheduled(self, schedule: Any) -> None:
        self._schedules.add(schedule)
        self.found.schedule_steps = self._schedules.most
        if self.watch is not None:
            self.watch.note("scheduled")

    def _flat(self, tensors: Sequence[Tensor | None]) -> Tensor:
        flat = []
        for parameter, tensor in zip(self._parameters, tensors, strict=True):
            real = tensor if tensor is not None else torch.zeros_like(parameter, requires_grad=False)
            real = torch.view_as_real(real) if real.is_complex() else real
            flat.append(real.detach().flatten().to("cpu", torch.float64))
        return torch.cat(flat)


def _is_narrow(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def _wide(tensor: Tensor) -> Tensor:
    """A copy in 32 bits or more."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.to(wide) if wide != tensor.dtype else tensor.clone()


def _arguments(step: StepFn) -> str | None:
    """Return the name of the argument that takes a schedule, if there is one."""
    try:
        signature = inspect.signature(step)
    except (TypeError, ValueError):  # some built-in functions do not tell theirs
        return None
    takes = next((name for name in signature.parameters if "sched" in name.lower()), None)
    try:
        signature.bind("model", "optimizer", "micro_batches", **({takes: "schedule"} if takes else {}))
    except TypeError as error:
        raise ConfigError(
            f"The step cannot be called as step(model, optimizer, micro_batches): {error}.",
            hint="write it as def step(model, optimizer, micro_batches), if need be with lr_scheduler after them.",
        ) from error
    return takes
