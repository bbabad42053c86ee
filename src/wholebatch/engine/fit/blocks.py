"""What does each block of a model keep, and how long would it take to compute it anew?"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from wholebatch.core.tree import flatten
from wholebatch.core.ways import Block
from wholebatch.engine import memory
from wholebatch.engine.fit.clock import now


class Ledger:
    """Counts, block by block, what a forward pass keeps for its backward pass, and how long it takes.

    Nothing is kept meanwhile: what is saved is counted and let go, so that there is no backward pass afterwards.

    Args:
        model: Whose blocks are looked at.
        names: Of the blocks.
        device: Where it is.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], device: torch.device) -> None:
        modules = dict(model.named_modules())
        self._blocks = {name: modules[name] for name in names}
        self._device = device
        self._held = {_key(each) for each in (*model.parameters(), *model.buffers())}
        self._open: list[tuple[str, float]] = []
        self._of: dict[int, tuple[str, int]] = {}
        self._alive: dict[int, Any] = {}
        self._bytes = dict.fromkeys(names, 0)
        self._seconds = dict.fromkeys(names, 0.0)

    def clear(self) -> None:
        """Forget what was seen."""
        self._bytes = dict.fromkeys(self._bytes, 0)
        self._seconds = dict.fromkeys(self._seconds, 0.0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the forward passes of this block of code."""
        handles = []
        for name, block in self._blocks.items():
            handles.append(block.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True))
            handles.append(block.register_forward_hook(partial(self._leave, name)))
        try:
            with saved_tensors_hooks(self._pack, _gone):
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._open.clear()

    def blocks(self, rows: int) -> list[Block]:
        """Return what was seen, for a row.

        Args:
            rows: That went through.
        """
        return [
            Block(name, type(block).__name__, self._bytes[name] / rows, self._seconds[name] / rows)
            for name, block in self._blocks.items()
        ]

    def _enter(self, name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        for _, leaf, _ in flatten([args, kwargs])[0]:
            if isinstance(leaf, Tensor) and _key(leaf) not in self._alive:  # what goes in is kept in any case
                self._watch(leaf)
        memory.synchronize(self._device)
        self._open.append((name, now(self._device)))

    def _leave(self, name: str, _module: nn.Module, _args: Any, result: Any) -> None:
        memory.synchronize(self._device)
        _, start = self._open.pop()
        self._seconds[name] += now(self._device) - start
        for _, leaf, _ in flatten(result)[0]:
            if isinstance(leaf, Tensor):  # what comes out is wanted by the next block too
                self._bytes[name] -= self._forget(_key(leaf), name)

    def _pack(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if not self._open or key in self._held or key in self._alive:
            return
        name, size = self._open[0][0], tensor.untyped_storage().nbytes()
        self._watch(tensor)
        self._of[key] = name, size
        self._bytes[name] += size

    def _watch(self, tensor: Tensor) -> None:
        key = _key(tensor)
        self._alive[key] = weakref.ref(tensor.untyped_storage(), lambda _: self._release(key))

    def _release(self, key: int) -> None:
        self._alive.pop(key, None)
        self._of.pop(key, None)

    def _forget(self, key: int, name: str) -> int:
        owner, size = self._of.pop(key, (name, 0))
        return size if owner == name else 0


def _key(tensor: Tensor) -> int:
    return id(tensor.untyped_storage())


def _gone(_: object) -> Tensor:
    raise RuntimeError("what this graph needs was let go, since it was only looked at")
