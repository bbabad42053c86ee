"""How are gradients of 16-bit weights summed where all micro-batches share one graph? Each micro-batch apart.

Autograd adds up what reaches a weight in one backward pass before anybody sees it, in the dtype of the weight; over
hundreds of micro-batches in one graph that sum stagnates in 16 bits. So each micro-batch uses an alias of its own:
its gradient arrives by itself and is added to the window's sum, which is wider.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from wholebatch.engine.device import modules

Receive = Callable[[nn.Parameter, Tensor], None]
"""Takes the gradient of a weight from one micro-batch."""


class Taps:
    """Aliases of a model's 16-bit weights, one for each micro-batch, of which those are in place whose turn it is.

    Args:
        model: Whose modules hold the weights.
        narrow: The weights.
        receive: Takes their gradients.
    """

    def __init__(self, model: nn.Module, narrow: Collection[nn.Parameter], receive: Receive) -> None:
        ids = {id(each) for each in narrow if each.requires_grad and type(each) is nn.Parameter}
        self._places = [
            (module, name, weight)
            for module in (modules(model) if ids else [])
            for name, weight in module._parameters.items()
            if id(weight) in ids and weight is not None
        ]
        self._receive = receive
        self._aliases: dict[tuple[int, int], Tensor] = {}

    def take_turn(self, number: int) -> None:
        """Put the aliases of a micro-batch in place."""
        for module, name, weight in self._places:
            if (number, id(weight)) not in self._aliases:
                self._aliases[number, id(weight)] = _Tap.apply(weight, self._receive)  # type: ignore[no-untyped-call]
            module._parameters[name] = self._aliases[number, id(weight)]  # type: ignore[assignment]

    def put_back(self) -> None:
        """Put the weights back in place."""
        for module, name, weight in self._places:
            module._parameters[name] = weight
        self._aliases.clear()


class _Tap(torch.autograd.Function):
    """A weight, whose gradient goes elsewhere."""

    @staticmethod
    def forward(ctx: Any, weight: nn.Parameter, receive: Receive) -> Tensor:
        ctx.weight, ctx.receive = weight, receive
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.receive(ctx.weight, gradient)
        return None, None
