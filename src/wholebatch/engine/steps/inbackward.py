"""Does somebody step a weight as soon as its gradient has arrived? Then it is stepped once for each micro-batch."""

import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def steps_in_backward(parameter: Tensor) -> str | None:
    """Return the name of an optimizer that a hook on a weight holds, as one does that steps it in the backward pass.

    What a hook does cannot be seen; that it keeps an optimizer at hand can.

    Args:
        parameter: A weight.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> hook = weight.register_post_accumulate_grad_hook(lambda weight: optimizer.step())
        >>> steps_in_backward(weight)
        'SGD'
    """
    hooks = (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()
    held = [value for hook in hooks for value in _held_by(hook)]
    held += getattr(parameter, "_in_backward_optimizers", [])  # as torch.distributed.optim leaves them
    found = next((each for value in held for each in _within(value) if isinstance(each, Optimizer)), None)
    return type(found).__name__ if found is not None else None


def _held_by(hook: Any) -> Iterator[Any]:
    """What a hook has at hand: bound to it, or named in it."""
    if isinstance(hook, partial):
        yield from (*hook.args, *hook.keywords.values())
        hook = hook.func
    yield getattr(hook, "__self__", None)
    function = getattr(hook, "__func__", hook)
    if inspect.isfunction(function):
        yield from function.__defaults__ or ()
        try:
            names = inspect.getclosurevars(function)
        except ValueError:  # a name that has no value yet
            return
        yield from (*names.nonlocals.values(), *names.globals.values())


def _within(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value
    else:
        yield from getattr(value, "__dict__", {}).values()
