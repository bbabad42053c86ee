"""Where does the running sum of a window's gradients live?

Autograd adds each micro-batch's gradient to ``parameter.grad``, in the dtype of the weights. That is right for 32 and
64 bits. In 16 bits a hook takes each gradient as soon as it has arrived and adds it to a sum of its own, so that never
more than one parameter's gradient exists in 16 bits beside the sum.
"""

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wholebatch.core.errors import WindowError
from wholebatch.engine import holding
from wholebatch.engine.narrow import OwnSum, SumIn, own_sum
from wholebatch.engine.ranks.shares import local_of, share_of
from wholebatch.engine.steps.consuming import Consumption


@dataclass(frozen=True, slots=True)
class Mark:
    """How far the sums of all parameters had come at one moment.

    Attributes:
        sums: Each of them, or None where there was none yet.
        versions: How often each had been written.
        stays: Whether the next gradients are added to the same tensors.
    """

    sums: list[Tensor | None]
    versions: list[int]
    stays: bool


class GradientSum:
    """The gradient of the logical batch, as it grows.

    Several accumulators may have a window open at the same time, as the two players of a GAN do, and the backward
    pass of one reaches the parameters of the other. Only the window that runs holds its sum in ``.grad``; the others
    keep theirs aside, and what lands on their parameters meanwhile is dropped.

    Args:
        parameters: What the optimizers step.
        bystanders: Parameters of the model that no optimizer steps; their ``.grad`` is left as it was found.
        sum_in: How gradients of 16-bit weights are summed. Wider weights always sum in their own dtype.
        consumption: Takes the gradients of some parameters in as they arrive; for them there is no sum.

    Attributes:
        parameters: As given.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        bystanders: Sequence[nn.Parameter],
        sum_in: SumIn,
        consumption: Consumption | None = None,
    ) -> None:
        self._consumption = consumption
        self._scale: Tensor | None = None
        self.parameters = list(parameters)
        self._everything = [*parameters, *bystanders]
        self._found: list[Tensor | None] = []
        self._parked: list[Tensor | None] | None = None
        self._own: dict[Tensor, OwnSum] = {}
        self._totals: dict[Tensor, Tensor] = {}  # over all ranks, of 16-bit weights
        self._left_out: set[Tensor] = set()
        self._listening = False
        self._watched: Tensor | None = None
        self._grad: Tensor | None = None
        self._version = -1
        consumed = set(consumption.parameters if consumption is not None else ())
        for parameter in self.parameters:
            is_narrow = parameter.is_floating_point() and parameter.element_size() < 4
            if is_narrow and parameter not in consumed and (own := own_sum(sum_in)) is not None:
                self._own[parameter] = own
        kinds = {(each.device, each.dtype) for each in parameters}
        self._uniform = len(kinds) == 1 and parameters[0].dtype in (torch.float32, torch.float64)
        hook = _hook(weakref.ref(self))
        hooks = [_listen(parameter, hook) for parameter in [*self._own, *consumed]]
        weakref.finalize(self, _remove, hooks)

    def start(self, scale: Tensor | None = None) -> None:
        """Begin with nothing. Gradients that somebody left behind are set aside, never added.

        Args:
            scale: The loss scale, on the device, or None.
        """
        self._scale = scale
        holding.hold(self)
        self._found = [parameter.grad for parameter in self._everything]
        for parameter in self._everything:
            parameter.grad = None
        self._watched = self._grad = None

    def open_backward(self) -> None:
        """Make sure that what is in ``.grad`` is this window's, and listen for what arrives.

        Raises:
            WindowError: Somebody zeroed, scaled or added to the gradients since the last micro-batch.
        """
        self.hold()
        if self._consumption is not None:
            self._consumption.begin(self._scale)
        self._listening = True

    def close_backward(self) -> None:
        """Stop listening, and mark how far the sum has come."""
        self._listening = False
        if self._watched is None:
            self._watched = self._choose_watched()
        grad = self._grad = self._watched.grad
        self._version = -1 if grad is None else grad._version

    def mark(self, last: Mark | None = None) -> Mark:
        """Return how far the sum of each parameter has come.

        Args:
            last: The last mark of this window, whose sums need not be looked up again.
        """
        if last is not None and last.stays:
            return Mark(last.sums, [each._version for each in last.sums], True)  # type: ignore[union-attr]
        sums = list(map(self._held, self.parameters))
        stays = not self._own and all(each is not None and each.layout == torch.strided for each in sums)
        return Mark(sums, [-1 if each is None else each._version for each in sums], stays)

    def take_back(self, mark: Mark) -> list[nn.Parameter]:
        """Forget first gradients that have arrived since a mark, and return the parameters where they met others."""
        self._listening = False
        self._watched = self._grad = None
        met: list[nn.Parameter] = []
        for parameter, before, version in zip(self.parameters, mark.sums, mark.versions, strict=True):
            if parameter in self._own:
                parameter.grad = None
            now = self._held(parameter)
            if now is before and (now is None or now._version == version):
                continue
            if before is not None:
                met.append(parameter)
            elif parameter in self._own:
                self._own[parameter].clear()
            else:
                parameter.grad = None
        return met

    def subtract(self, losses: Sequence[Tensor], roots: Sequence[Tensor], parameters: Collection[nn.Parameter]) -> None:
        """Add what a backward pass brings to some parameters and to no other, and end it when all have theirs.

        Args:
            losses: Where the pass begins.
            roots: The gradients that enter there.
            parameters: Which.
        """
        left = set(parameters)

        def arrived(parameter: nn.Parameter) -> None:
            left.discard(parameter)
            if not left:
                raise _Enough

        hooks = [_listen(parameter, arrived) for parameter in parameters]
        others = [each for each in self.parameters if each.requires_grad and each not in left]
        try:
            with self._leaving_out(others):
                self._listening = True
                torch.autograd.backward(losses, roots)
        except _Enough:
            pass
        finally:
            self._listening = False
            _remove(hooks)

    @contextmanager
    def _leaving_out(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Drop what arrives at some parameters, and leave their sums as they are."""
        grads = [parameter.grad for parameter in parameters]
        hooks = [_listen(parameter, _drop) for parameter in parameters]
        self._left_out.update(parameters)
        for parameter in parameters:
            parameter.grad = None
        try:
            yield
        finally:
            _remove(hooks)
            self._left_out.difference_update(parameters)
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad

    def _held(self, parameter: nn.Parameter) -> Tensor | None:
        """What the sum of a parameter is held in, or None where there is nothing yet."""
        own = self._own.get(parameter) if self._own else None
        return own.held if own is not None else parameter.grad

    def hold(self) -> None:
        """Make this the window whose sum is in ``.grad``.

        Raises:
            WindowError: Somebody zeroed, scaled or added to the gradients since the last micro-batch.
        """
        if not holding.holds(self):
            holding.hold(self)
            return
        if self._watched is None:
            return
        grad = self._watched.grad
        if grad is not self._grad or (grad is not None and grad._version != self._version):
            done = "set to None" if grad is None else "changed"
            raise WindowError(
                f"Inside an open window the gradients were {done} by somebody else.",
                hint="the window owns the gradients until it closes: leave out optimizer.zero_grad(), "
                "loss.backward() and clipping between its micro-batches; it does all three (clip_norm=...).",
            )

    @property
    def consumes(self) -> bool:
        """Whether gradients are taken in as they arrive, so that they must be divided before."""
        return self._consumption is not None

    @property
    def narrow(self) -> Collection[nn.Parameter]:
        """The weights whose gradients are summed apart, since their own 16 bits are too few."""
        return cast(Collection[nn.Parameter], self._own.keys())

    def receive(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Add the gradient of one of these weights, inside a backward pass of the window."""
        parameter.grad = gradient
        self._take(parameter)

    @property
    def empty(self) -> bool:
        """Whether no gradient has arrived."""
        if self._consumption is not None and not self._consumption.empty:
            return False
        return all(p.grad is None for p in self.parameters) and not any(own.holds for own in self._own.values())

    def own_tensors(self) -> list[Tensor]:
        """Return what sums of its own are kept in, for those who count memory."""
        return [tensor for own in self._own.values() for tensor in vars(own).values() if tensor is not None]

    @property
    def own_bytes(self) -> int:
        """What sums of its own take once every gradient has arrived. Unit: bytes."""
        return sum(own.bytes_each * parameter.numel() for parameter, own in self._own.items())

    def norms(self) -> list[Tensor]:
        """Return 2-norms whose own 2-norm is that of the sum, still on their devices. Each of shape ``[]``.

        Of gradients that were taken in as they arrived, it is that of their parts.
        """
        consumed = self._consumption.norms if self._consumption is not None else []
        grads = [grad for p in self.parameters if (grad := p.grad) is not None]
        if any(grad.is_sparse for grad in grads):
            grads = list(map(_values, grads))
        if self._uniform:
            return [*torch._foreach_norm(grads), *consumed] if grads else consumed
        norms = [torch.linalg.vector_norm(grad, dtype=_at_least_fp32(grad)) for grad in grads]
        norms += [torch.linalg.vector_norm(_values(own.total())) for own in self._own.values() if own.holds]
        return norms + consumed

    def deliver(self, factor: float) -> None:
        """Put the sum times `factor` into ``.grad``, in the dtype of the weights, where the optimizer looks for it."""
        plain = [p.grad for p in self.parameters if p.grad is not None]
        if factor != 1.0:
            dense = [grad for grad in plain if grad.layout == torch.strided]
            if dense:
                torch._foreach_mul_(dense, factor)
            for grad in plain:
                if grad.layout != torch.strided:
                    grad.mul_(factor)
        for parameter, own in self._own.items():
            if own.holds:
                parameter.grad = share_of(parameter, own.total().mul_(factor).to(parameter.dtype))
                own.clear()
        for parameter, total in self._totals.items():
            parameter.grad = total.mul_(factor).to(parameter.dtype)
        self._totals = {}

    def holds(self, parameter: Tensor) -> bool:
        """Whether there is a gradient of a parameter."""
        return parameter.grad is not None or (parameter in self._own and self._own[parameter].holds)

    def shares(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each parameter that has a gradient with what this rank holds of the sum."""
        for parameter in self.parameters:
            own = self._own.get(parameter)
            if own is not None and own.holds:
                yield parameter, own.total()
            elif parameter.grad is not None:
                yield parameter, local_of(parameter.grad)

    def take_out(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the sum of a parameter's gradients, and keep nothing of it; None if there is none."""
        own = self._own.get(parameter)
        if own is not None and own.holds:
            total = own.total()
            own.clear()
            return total
        gradient, parameter.grad = parameter.grad, None
        return gradient

    def put(self, parameter: nn.Parameter, total: Tensor) -> None:
        """Put the sum of a parameter's gradients over all ranks in its place."""
        if parameter.element_size() < 4:
            self._totals[parameter] = total.to(torch.float32)
        else:
            parameter.grad = total.to(parameter.dtype)

    def drain(self, factor: float) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each parameter with its sum times `factor`, in 32 bits at least, and keep nothing of it."""
        for parameter in self.parameters:
            total = self._totals.pop(parameter, None)
            if total is None:
                total, parameter.grad = parameter.grad, None
            if total is not None:
                yield parameter, total.mul_(factor)

    def state_dict(self) -> dict[str, Any]:
        """Return the sum so far, and what was in ``.grad`` before the window.

        Raises:
            WindowError: A backward pass is under way, or gradients were taken in as they arrived.
        """
        if self._listening or self.consumes:
            what = "a backward pass is under way" if self._listening else "its gradients were taken in as they arrived"
            raise WindowError(
                f"A window is open, and {what}, so that there is no sum to keep.",
                hint="save between micro-batches." if self._listening else "save between windows.",
            )
        held = self._parked if self._parked is not None else [each.grad for each in self._everything]
        number = len(self.parameters)
        own = [vars(self._own[each]) if each in self._own else None for each in self.parameters]
        sums, found = ([None if g is None else local_of(g) for g in kept[:number]] for kept in (held, self._found))
        return {"sums": sums, "own": own, "found": found}

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Whether a sum of another process is one of the same gradients, kept in the same way."""
        kept = [vars(self._own[each]).keys() if each in self._own else None for each in self.parameters]
        return not self.consumes and kept == [None if each is None else each.keys() for each in state["own"]]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a sum that fits, after `start`."""
        number = len(self.parameters)
        for parameter, total, own in zip(self.parameters, state["sums"], state["own"], strict=True):
            parameter.grad = _gradient_here(total, parameter)
            if parameter in self._own:
                for name, value in own.items():
                    setattr(self._own[parameter], name, _here(value, parameter))
        self._found[:number] = map(_gradient_here, state["found"], self.parameters)

    def commit(self) -> None:
        """End with an update: the gradients are used up."""
        if self._consumption is not None:
            self._consumption.commit()
        self._end([None] * len(self.parameters))

    def roll_back(self) -> None:
        """End without one: ``.grad`` is what it was before the window."""
        if self._consumption is not None:
            self._consumption.roll_back()
        holding.hold(self)
        self._end(self._found[: len(self.parameters)])

    def _choose_watched(self) -> Tensor:
        """A parameter that shows if somebody else touched the gradients: one whose ``.grad`` is the sum, if any."""
        return next((each for each in self.parameters if each.grad is not None), self.parameters[-1])

    def _end(self, left: Sequence[Tensor | None]) -> None:
        self._listening = False
        for own in self._own.values():
            own.clear()
        self._totals = {}
        found = [*left, *self._found[len(self.parameters) :]]
        for parameter, grad in zip(self._everything, found, strict=True):
            parameter.grad = grad
        self._found = []
        self._watched = self._grad = None
        self._parked = None
        holding.release(self)

    def park(self) -> None:
        self._parked = [parameter.grad for parameter in self._everything]
        for parameter in self._everything:
            parameter.grad = None

    def unpark(self) -> None:
        if self._parked is not None:
            for parameter, grad in zip(self._everything, self._parked, strict=True):
                parameter.grad = grad
            self._parked = None

    def _take(self, parameter: nn.Parameter) -> None:
        if self._listening and parameter.grad is not None:
            if parameter in self._left_out:
                parameter.grad = None
            elif parameter in self._own:
                self._own[parameter].add(local_of(parameter.grad))
                parameter.grad = None
            elif self._consumption is not None:
                self._consumption.take(parameter)


class _Enough(Exception):  # noqa: N818 - no error
    """Ends a backward pass that has brought all that is wanted."""


def _hook(listener: "weakref.ref[GradientSum]") -> Callable[[nn.Parameter], None]:
    def take(parameter: nn.Parameter) -> None:
        gradient_sum = listener()
        if gradient_sum is not None:
            gradient_sum._take(parameter)

    return take


def _drop(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _listen(parameter: Any, hook: Callable[[nn.Parameter], None]) -> RemovableHandle:
    learns = parameter.requires_grad
    parameter.requires_grad_(True)  # a frozen parameter takes no hook, but keeps one until it is unfrozen
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)
    parameter.requires_grad_(learns)
    return handle


def _remove(hooks: Sequence[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def _here(tensor: Tensor | None, parameter: nn.Parameter) -> Tensor | None:
    """A copy on the device of a parameter."""
    return None if tensor is None else tensor.to(parameter.device, copy=True)


def _gradient_here(local: Tensor | None, parameter: nn.Parameter) -> Tensor | None:
    """The same of what this rank holds of its gradient, spread as the parameter is."""
    copied = _here(local, parameter)
    return None if copied is None else share_of(parameter, copied)


def _values(grad: Tensor) -> Tensor:
    """The numbers of a gradient; of a sparse one those that are stored, each place once."""
    return grad.coalesce().values() if grad.layout == torch.sparse_coo else grad


def _at_least_fp32(grad: Tensor) -> torch.dtype | None:
    return torch.float32 if grad.element_size() < 4 else None
