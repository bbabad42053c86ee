"""Which activations are recomputed instead of kept? Activation checkpointing, block by block."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wholebatch.core.errors import ConfigError


def checkpoint_blocks(model: nn.Module, blocks: Iterable[str] | None = None) -> tuple[str, ...]:
    """Let some blocks of a model recompute their activations in the backward pass instead of keeping them.

    What a block keeps until its backward pass is then its input alone; its forward pass runs once more. The gradient
    stays the same, with dropout and autocast too; a buffer that a forward pass changes, such as a running mean, is
    changed once. Names of parameters stay as they are, and `uncheckpoint_blocks` takes it back.

    Args:
        model: Changed in place.
        blocks: Names of submodules, such as `Plan.checkpointing`; None: every repeated block (`find_blocks`).

    Returns:
        The names of the blocks that recompute.

    Raises:
        ConfigError: The model has no such submodule, or no repeated blocks.

    Example:
        >>> model = nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(2)])
        >>> checkpoint_blocks(model)
        ('0', '1')
    """
    names = tuple(find_blocks(model) if blocks is None else blocks)
    if blocks is None and not names:
        raise ConfigError(
            f"{type(model).__name__} has no repeated blocks: no Sequential or ModuleList holds two of a kind.",
            hint="name the submodules, as in wb.checkpoint_blocks(model, ['encoder', 'decoder']).",
        )
    recompute(model, names)
    return names


@contextmanager
def recomputing(model: nn.Module, blocks: Iterable[str]) -> Iterator[None]:
    """Let some blocks recompute for a while; those that did before go on."""
    wrapped = recompute(model, blocks)
    try:
        yield
    finally:
        keep(wrapped)


def recompute(model: nn.Module, blocks: Iterable[str]) -> list[nn.Module]:
    """Let some blocks recompute, and return those that did not before, for `keep`.

    Raises:
        ConfigError: The model has no such submodule.
    """
    names, known = tuple(blocks), dict(model.named_modules())
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"The model has no submodule {name!r}.",
                hint=f"did you mean {near[0]!r}?" if near else "names are those of model.named_modules().",
            )
    wrapped = [known[name] for name in names if not isinstance(known[name].__dict__.get("forward"), _Recomputed)]
    for block in wrapped:
        block.forward = _Recomputed(block)
    return wrapped


def keep(blocks: Iterable[nn.Module]) -> None:
    """Let blocks keep their activations again."""
    for block in blocks:
        ours = block.__dict__.get("forward")
        if isinstance(ours, _Recomputed):
            ours.leave()


def uncheckpoint_blocks(model: nn.Module) -> None:
    """Take back what `checkpoint_blocks` did.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        >>> names = checkpoint_blocks(model, ["0"])
        >>> uncheckpoint_blocks(model)
        >>> "forward" in vars(model[0])
        False
    """
    keep(model.modules())


def find_blocks(model: nn.Module) -> list[str]:
    """Return the names of repeated blocks: two or more of a kind, side by side in a Sequential or a ModuleList.

    Only the outermost are named, and only those that learn and are made of several modules: a single layer keeps little
    beside its input. A block that recomputes already is none.

    Example:
        >>> def block():
        ...     return nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        >>> find_blocks(nn.ModuleList([nn.Embedding(5, 4), block(), block()]))
        ['1', '2']
    """
    found: list[str] = []

    def look(module: nn.Module, prefix: str) -> None:
        children = [(f"{prefix}{name}", child) for name, child in module.named_children()]
        kinds = [type(child) for _, child in children]
        for name, child in children:
            siblings = isinstance(module, nn.Sequential | nn.ModuleList) and kinds.count(type(child)) > 1
            learns = any(parameter.requires_grad for parameter in child.parameters())
            is_list = isinstance(child, nn.ModuleList | nn.ModuleDict)
            if siblings and learns and child._modules and not is_list:
                if not isinstance(child.__dict__.get("forward"), _Recomputed):
                    found.append(name)
            else:
                look(child, f"{name}.")

    look(model, "")
    return found


class _Recomputed:
    """The forward method of a block that recomputes. A class of its own, so that a model can still be copied."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._own = block.__dict__.get("forward")  # somebody else's, such as a hook of another library

    def leave(self) -> None:
        """Give the block back the forward method that it had."""
        del self._block.forward
        if self._own is not None:
            self._block.forward = self._own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._own if self._own is not None else partial(type(self._block).forward, self._block)
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=_contexts(self._block), **kwargs)


def _contexts(block: nn.Module) -> Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]:
    """How the two forward passes of a block run: the second finds the buffers of the first, and leaves none changed."""
    buffers = list(block.buffers())  # those that the first pass replaces, as a table that grows, stay replaced
    if not buffers:
        return lambda: (nullcontext(), nullcontext())
    before = [buffer.detach().clone() for buffer in buffers]
    return lambda: (nullcontext(), _with_buffers(buffers, before))


@contextmanager
def _with_buffers(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    after = [buffer.detach().clone() for buffer in buffers]
    _fill(buffers, values)
    try:
        yield
    finally:
        _fill(buffers, after)


def _fill(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Give buffers values without a trace in their version, since a graph may hold on to them; one that grew stays."""
    for buffer, value in zip(buffers, values, strict=True):
        if buffer.shape == value.shape:
            buffer.data.copy_(value)
