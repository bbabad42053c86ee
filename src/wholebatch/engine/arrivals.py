"""Who hears what a backward pass brings to a weight? Hooks on leaves, also on those that are frozen for now."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle, unserializable_hook


def when_added(parameter: Tensor, hook: Callable[[Any], None]) -> RemovableHandle:
    """Call a hook with the parameter whenever a gradient has been added to its ``.grad``."""
    hooked: Any = parameter
    with _learning(parameter):
        handle: RemovableHandle = hooked.register_post_accumulate_grad_hook(hook)
    return handle


def before_added(parameter: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Call a hook with what one backward pass brings to a parameter, before it is added to what is there."""
    hooked: Any = parameter
    unpickled: Any = unserializable_hook  # a model that is pickled leaves the hook behind
    with _learning(parameter):
        handle: RemovableHandle = hooked.register_hook(unpickled(hook))
    return handle


def remove(hooks: Iterable[RemovableHandle]) -> None:
    """Let further gradients be."""
    for hook in hooks:
        hook.remove()


@contextmanager
def _learning(parameter: Tensor) -> Iterator[None]:
    """A frozen parameter takes no hook, but keeps one until it is unfrozen."""
    learns = parameter.requires_grad
    parameter.requires_grad_(True)
    try:
        yield
    finally:
        parameter.requires_grad_(learns)
