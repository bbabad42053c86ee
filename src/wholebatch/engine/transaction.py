"""Commit or roll back: random state and buffers as they were before a window.

Weights, optimizer state, loss scale and schedule need no copy: nothing touches them before the window is known to be
good. The gradient sum has its own beginning and end (`sums.py`).
"""

import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class RandomState:
    """Where the random streams stand: torch on the CPU and on the accelerator in use, Python, and NumPy if loaded.

    Example:
        >>> state = RandomState.now()
        >>> first = torch.rand(3)
        >>> state.restore()
        >>> bool((torch.rand(3) == first).all())
        True
    """

    cpu: Tensor
    device: torch.device | None
    on_device: Tensor | None
    python: Any
    numpy: Any

    @classmethod
    def now(cls, device: torch.device | None = None) -> "RandomState":
        """Take the state of every stream that a model may draw from.

        Args:
            device: An accelerator whose stream is taken as well.
        """
        on_accelerator = device is not None and device.type != "cpu"
        numpy: Any = sys.modules.get("numpy")
        return cls(
            cpu=torch.get_rng_state(),
            device=device if on_accelerator else None,
            on_device=torch.get_device_module(device).get_rng_state(*_place(device)) if on_accelerator else None,
            python=random.getstate(),
            numpy=numpy and numpy.random.get_state(),
        )

    def restore(self) -> None:
        """Put every stream back to where it stood."""
        torch.set_rng_state(self.cpu)
        if self.on_device is not None:
            torch.get_device_module(self.device).set_rng_state(self.on_device, *_place(self.device))
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def _place(device: torch.device | None) -> tuple[torch.device, ...]:
    """How a random stream is named to its module: by device, but Metal has only one."""
    return () if device is None or device.type == "mps" else (device,)


@dataclass(slots=True)
class _Kept:
    """One buffer as it was: the tensor itself, its version when it was copied, and the copy."""

    tensor: Tensor
    version: int
    copy: Tensor


class Transaction:
    """What a model's forward passes change, kept so that it can be undone.

    Buffers are copied before a window, but only those that changed since they were last copied: constant ones (masks,
    tables) cost one copy in all.

    Args:
        model: Whose buffers are kept.
        device: Whose random stream is kept, besides those of the CPU.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._kept: dict[tuple[int, str], _Kept] = {}
        self._owners: list[nn.Module] = []
        self._random: RandomState | None = None

    def begin(self) -> None:
        """Keep random state and buffers as they are now."""
        self._random = RandomState.now(self._device)
        self._owners = [module for module in self._model.modules() if module._buffers]
        kept: dict[tuple[int, str], _Kept] = {}
        for module in self._owners:
            for name, tensor in module._buffers.items():
                if tensor is None:
                    continue
                key = (id(module), name)
                last = self._kept.get(key)
                if last is None or last.tensor is not tensor or last.version != tensor._version:
                    last = _Kept(tensor, tensor._version, tensor.detach().clone())
                kept[key] = last
        self._kept = kept

    def roll_back(self) -> None:
        """Put random state and buffers back to where they were at `begin`."""
        if self._random is not None:
            self._random.restore()
        for module in self._owners:
            for name in list(module._buffers):
                last = self._kept.get((id(module), name))
                if last is None:
                    module._buffers[name] = None
                    continue
                if last.tensor._version != last.version:
                    with torch.no_grad():
                        last.tensor.copy_(last.copy)
                    last.version = last.tensor._version
                module._buffers[name] = last.tensor


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block, so that an update happens once or not at all.

    Only the main thread can, and needs to: Python delivers the interrupt there.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held and callable(before):
            before(*held[0])
