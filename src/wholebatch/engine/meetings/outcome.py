"""What did a meeting come to, and which gradient enters where? What a replay knows between its two passes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wholebatch.engine.meetings.call import Call, without_value
from wholebatch.engine.meetings.company import Again
from wholebatch.engine.meetings.draws import Passage
from wholebatch.engine.meetings.moving import Moving
from wholebatch.engine.meetings.reach import Reach
from wholebatch.engine.meetings.recomputing import Minutes


class Meeting:
    """What all micro-batches brought, what it came to, and the gradient that enters there.

    Args:
        calls: What each brought.
        reach: Those that meet.
        passage: Where the random stream stood.
        moving: Takes what it does once.
        is_constant: Whether nobody's gradient enters there.

    Attributes:
        is_tracked: Whether the second pass gets the result with a graph, through which nothing flows.
    """

    is_tracked = False

    def __init__(
        self, calls: Sequence[Call], reach: Reach, passage: Passage, moving: Moving, *, is_constant: bool
    ) -> None:
        self.passage = passage
        self.is_constant = is_constant
        self.calls = [_without_graph(call) for call in calls]
        self.key = calls[0].key
        self.alike = calls[0].kind, id(calls[0].of)
        self.minutes = Minutes(reach.ranks)
        self._leaves = [call.value for call in self.calls]
        differentiable = not is_constant and _is_differentiable(self._leaves[0])
        if differentiable:
            self._leaves = [leaf.requires_grad_() for leaf in self._leaves]
        brought = reach.hear(self.calls, self._leaves, graph=False)
        with torch.enable_grad():
            self._made = calls[0].combine(brought.values, brought.beside, reach.order)
        self.result = self._made.detach() if isinstance(self._made, Tensor) else self._made
        self._differentiable = differentiable and _is_differentiable(self._made) and self._made.requires_grad
        self._given: dict[int, Tensor] = {}
        self._gradient: Tensor | None = None
        self._entering: Sequence[Tensor | None] = ()
        moving.once(calls[0], self.result, brought.beside)
        self.minutes.take(self.calls, self.result, lambda _: self.result, passage)

    def answers(self, calls: Sequence[Call], kept: int | None) -> list[Any]:
        """Return what each micro-batch gets in the first pass: a leaf of its own, where gradients are wanted.

        Args:
            calls: What each brings.
            kept: The micro-batch whose weights learn.
        """
        if not isinstance(self.result, Tensor):
            return [self.result] * len(calls)
        found = [self.result.detach() for _ in calls]
        for number, call in enumerate(calls):
            if self._differentiable and call.with_graph:
                self._given[number] = found[number].requires_grad_()
                if number != kept and call.value.requires_grad:  # of something else than weights, which are frozen
                    found[number] = _Inner.apply(call.value.view_as(call.value), found[number], str(call))  # type: ignore[no-untyped-call]
        return found

    def leaf_of(self, number: int) -> Tensor | None:
        return self._given.get(number)

    def take_leaf(self, number: int) -> Tensor | None:
        return self._given.pop(number, None)

    def add(self, gradient: Tensor | None) -> None:
        """Add what a micro-batch's loss gives."""
        if gradient is None:
            return
        if self._gradient is None:
            wide = gradient.dtype if gradient.element_size() >= 4 else torch.float32
            self._gradient = gradient.to(wide, copy=True)
        else:
            self._gradient += gradient

    def settle(self, reach: Reach, *, unique: bool) -> None:
        """Work out the gradient that enters at what each micro-batch brought, and forget what is not needed for it.

        Args:
            reach: Knows what else enters there.
            unique: Whether there is no other meeting of the kind, so that nobody has to tell them apart.
        """
        entering = reach.add_up(self._gradient, self.result) if self._differentiable else None
        if entering is not None:
            gradient = entering.to(self.result.dtype)
            self._entering = torch.autograd.grad(self._made, self._leaves, gradient, allow_unused=True)
        self._gradient = self._made = None
        self._leaves = []
        self._given.clear()
        if unique:
            self.calls = [without_value(call) for call in self.calls]
        self.minutes = Minutes(reach.ranks)
        self.minutes.take(self.calls, self.result, lambda _: self.result, self.passage)

    def entering(self, number: int) -> Tensor | None:
        return self._entering[number] if self._entering else None

    def replayed(self, call: Call) -> Any:
        """Return what a micro-batch gets in the second pass: a constant, unless its code asks for more."""
        if not isinstance(self.result, Tensor):
            return self.result
        if self.is_tracked and self._differentiable and call.with_graph and call.value.requires_grad:
            return _Known.apply(call.value, self.result)  # type: ignore[no-untyped-call]
        return self.result.detach()


class _Known(torch.autograd.Function):
    """What a meeting came to. The gradient that enters there is known, and enters elsewhere."""

    @staticmethod
    def forward(_ctx: Any, _value: Tensor, result: Tensor) -> Tensor:
        return result.detach()

    @staticmethod
    def backward(_ctx: Any, *_gradients: Tensor) -> tuple[None, None]:
        return None, None


class _Inner(torch.autograd.Function):
    """What a micro-batch got in the first pass. It does not lead to what was brought: asked for that, it ends there."""

    @staticmethod
    def forward(ctx: Any, _value: Tensor, leaf: Tensor, where: str) -> Tensor:
        ctx.where = where
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        if torch._C._will_engine_execute_node(ctx.next_functions[0][0]):
            raise Again(f"a gradient is taken inside the loss, through what meets at {ctx.where}", joined=True)
        return None, gradients[0], None


def _without_graph(call: Call) -> Call:
    return replace(call, value=call.value.detach()) if isinstance(call.value, Tensor) else call


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
