"""Where does the running sum of a window's gradients live?

Autograd adds each micro-batch's gradient to ``parameter.grad``, in the dtype of the weights. That is right for 32 and
64 bits. In 16 bits a hook takes each gradient as soon as it has arrived and adds it to a sum of its own, so that never
more than one parameter's gradient exists in 16 bits beside the sum.
"""

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from wholebatch.core.errors import WindowError
from wholebatch.engine.arrivals import remove, when_added
from wholebatch.engine.gradients import norm_of, stored
from wholebatch.engine.holding import Holding
from wholebatch.engine.narrow import SumIn, own_sums
from wholebatch.engine.ranks.shares import local_of, share_of
from wholebatch.engine.steps.consuming import Consumption


class GradientSum:
    """The gradient of the logical batch, as it grows.

    Args:
        parameters: What the optimizers step.
        bystanders: Parameters of the model that no optimizer steps; their ``.grad`` is left as it was found.
        sum_in: How gradients of 16-bit weights are summed. Wider weights always sum in their own dtype.
        consumption: Takes the gradients of some parameters in as they arrive; for them there is no sum.

    Attributes:
        parameters: As given.
        dtypes: Those that they had, by which it is decided how they are summed.
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
        self.dtypes = [each.dtype for each in parameters]
        self._holding = Holding(self.parameters, bystanders)
        consumed = set(consumption.parameters if consumption is not None else ())
        self._own = own_sums([each for each in self.parameters if each not in consumed], sum_in)
        self._totals: dict[Tensor, Tensor] = {}  # over all ranks, of 16-bit weights
        self._left_out: set[Tensor] = set()
        self._listening = False
        kinds = {(each.device, each.dtype) for each in parameters}
        self._uniform = len(kinds) == 1 and parameters[0].dtype in (torch.float32, torch.float64)
        hook = _hook(weakref.ref(self))
        weakref.finalize(self, remove, [when_added(parameter, hook) for parameter in [*self._own, *consumed]])

    def start(self, scale: Tensor | None = None) -> None:
        """Begin with nothing. Gradients that somebody left behind are set aside, never added.

        Args:
            scale: The loss scale, on the device, or None.
        """
        self._scale = scale
        self._holding.begin()

    def open_backward(self) -> None:
        """Make sure that what is in ``.grad`` is this window's, and listen for what arrives.

        Raises:
            WindowError: Somebody zeroed, scaled or added to the gradients since the last micro-batch.
        """
        self._holding.hold()
        if self._consumption is not None:
            self._consumption.begin(self._scale)
        self._listening = True

    def close_backward(self) -> None:
        """Stop listening, and note how far the sum has come."""
        self._listening = False
        self._holding.watch()

    def lose_track(self) -> None:
        """Take the sum as it stands, after a backward pass that was broken off."""
        self._listening = False
        self._holding.lose_track()

    @contextmanager
    def leaving_out(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Drop what arrives at some parameters in the block, and leave their sums as they are."""
        grads = [parameter.grad for parameter in parameters]
        hooks = [when_added(parameter, _drop) for parameter in parameters]
        self._left_out.update(parameters)
        for parameter in parameters:
            parameter.grad = None
        try:
            yield
        finally:
            remove(hooks)
            self._left_out.difference_update(parameters)
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad

    def so_far(self) -> list[Tensor | None]:
        """Return what the sum of each parameter is held in, wherever that is kept; None where there is nothing yet."""
        grads = zip(self.parameters, self._holding.gradients, strict=True)
        return [self._own[each].held if each in self._own else grad for each, grad in grads]

    def forget(self, parameter: nn.Parameter) -> None:
        """Keep nothing of a parameter's sum."""
        parameter.grad = None
        if parameter in self._own:
            self._own[parameter].clear()

    def hold(self) -> None:
        """Make this the window whose sum is in ``.grad``; see `Holding.hold`."""
        self._holding.hold()

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

    def norms(self) -> list[Tensor]:
        """Return 2-norms whose own 2-norm is that of the sum, still on their devices. Each of shape ``[]``.

        Of gradients that were taken in as they arrived, it is that of their parts.
        """
        consumed = self._consumption.norms if self._consumption is not None else []
        grads = [grad for p in self.parameters if (grad := p.grad) is not None]
        if self._uniform:
            if any(grad.is_sparse for grad in grads):
                grads = list(map(stored, grads))
            return [*torch._foreach_norm(grads), *consumed] if grads else consumed
        norms = list(map(norm_of, grads))
        norms += [norm_of(own.total()) for own in self._own.values() if own.holds]
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
        own = [vars(self._own[each]) if each in self._own else None for each in self.parameters]
        sums, found = (
            [None if each is None else local_of(each) for each in kept]
            for kept in (self._holding.gradients, self._holding.found)
        )
        return {"sums": sums, "own": own, "found": found}

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Whether a sum of another process is one of the same gradients, kept in the same way."""
        kept = [vars(self._own[each]).keys() if each in self._own else None for each in self.parameters]
        return not self.consumes and kept == [None if each is None else each.keys() for each in state["own"]]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a sum that fits, after `start`."""
        for parameter, total, own in zip(self.parameters, state["sums"], state["own"], strict=True):
            parameter.grad = _gradient_here(total, parameter)
            if parameter in self._own:
                for name, value in own.items():
                    setattr(self._own[parameter], name, _here(value, parameter))
        self._holding.found = list(map(_gradient_here, state["found"], self.parameters))
        self._holding.lose_track()

    def commit(self) -> None:
        """End with an update: the gradients are used up."""
        if self._consumption is not None:
            self._consumption.commit()
        self._end(used_up=True)

    def roll_back(self) -> None:
        """End without one: ``.grad`` is what it was before the window."""
        if self._consumption is not None:
            self._consumption.roll_back()
        self._end(used_up=False)

    def _end(self, *, used_up: bool) -> None:
        self._listening = False
        for own in self._own.values():
            own.clear()
        self._totals = {}
        self._holding.end(used_up=used_up)

    def _take(self, parameter: nn.Parameter) -> None:
        if self._listening and parameter.grad is not None:
            if parameter in self._left_out:
                parameter.grad = None
            elif parameter in self._own:
                self._own[parameter].add(local_of(parameter.grad))
                parameter.grad = None
            elif self._consumption is not None:
                self._consumption.take(parameter)


def _hook(listener: "weakref.ref[GradientSum]") -> Callable[[nn.Parameter], None]:
    def take(parameter: nn.Parameter) -> None:
        gradient_sum = listener()
        if gradient_sum is not None:
            gradient_sum._take(parameter)

    return take


def _drop(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _here(tensor: Tensor | None, parameter: nn.Parameter) -> Tensor | None:
    """A copy on the device of a parameter."""
    return None if tensor is None else tensor.to(parameter.device, copy=True)


def _gradient_here(local: Tensor | None, parameter: nn.Parameter) -> Tensor | None:
    """The same of what this rank holds of its gradient, spread as the parameter is."""
    copied = _here(local, parameter)
    return None if copied is None else share_of(parameter, copied)
