"""How does a gradient come back from the ranks that read what this one brought?"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

AddUp = Callable[[Tensor], Tensor]
"""Returns the sum over all ranks of what each gives."""


def shared(add_up: AddUp, token: Tensor, everything: Sequence[Any], own: range) -> tuple[Tensor, list[Any]]:
    """Return what all ranks bring so that the gradients that enter there come back to where it was brought.

    Args:
        add_up: Called in the backward pass, once on every rank.
        token: Hangs on the sharing before this one, so that in the backward pass all ranks come by them in the same
            order, whatever their own graphs look like. Shape ``[]``.
        everything: What all ranks bring, the same on each of them.
        own: Which of it is from this one.

    Returns:
        The next token, and everything.
    """
    everything = list(everything)
    places = [place for place, each in enumerate(everything) if _takes_gradients(each)]
    mine = [place in own for place in places]
    with torch.enable_grad():
        token, *found = _Shared.apply(add_up, mine, token, *(everything[place] for place in places))  # type: ignore[no-untyped-call]
    for place, each in zip(places, found, strict=True):
        everything[place] = each
    return token, everything


class _Shared(torch.autograd.Function):
    """What all ranks bring, as each of them reads it. In the backward pass what they give comes together."""

    @staticmethod
    def forward(ctx: Any, add_up: AddUp, mine: Sequence[bool], token: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.add_up, ctx.mine = add_up, mine
        return token.detach(), *(value.detach() for value in values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_token: Tensor, *d_values: Tensor) -> tuple[Any, ...]:
        wide = torch.float32
        for each in d_values:
            wide = torch.promote_types(wide, each.dtype)
        total = ctx.add_up(torch.cat([each.to(wide).reshape(-1) for each in d_values]))
        parts = total.split([each.numel() for each in d_values])
        found = [
            part.reshape(each.shape).to(each.dtype) if mine else None
            for each, part, mine in zip(d_values, parts, ctx.mine, strict=True)
        ]
        return None, None, d_token, *found


def _takes_gradients(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
