"""Where do the random streams stand, and how do they get back there?"""

import ctypes
import random
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wholebatch.core.tree import map_leaves


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
        return cls(
            cpu=torch.get_rng_state(),
            device=device if on_accelerator else None,
            on_device=torch.get_device_module(device).get_rng_state(*_place(device)) if on_accelerator else None,
            python=_python.state(),
            numpy=_numpy.state(),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the states, for `of`: tensors, and numbers in place of NumPy's, so that ``torch.load`` takes them."""
        numpy = map_leaves(lambda leaf: leaf.tolist() if hasattr(leaf, "tolist") else leaf, self.numpy)
        return {"cpu": self.cpu, "on device": self.on_device, "python": self.python, "numpy": numpy}

    @classmethod
    def of(cls, state: Mapping[str, Any], device: torch.device) -> "RandomState":
        """Return the state that `state_dict` was made of; that of an accelerator only where there is one here."""
        there = state["on device"] is not None and device.type != "cpu"
        return cls(
            cpu=state["cpu"],
            device=device if there else None,
            on_device=state["on device"] if there else None,
            python=state["python"],
            numpy=state["numpy"],
        )

    def stands(self) -> bool:
        """Return whether nobody has drawn from any of the streams since."""
        now = RandomState.now(self.device)
        return _same(
            (self.cpu, self.on_device, self.python, self.numpy), (now.cpu, now.on_device, now.python, now.numpy)
        )

    def restore(self) -> None:
        """Put every stream back to where it stood."""
        torch.set_rng_state(self.cpu)
        if self.on_device is not None:
            torch.get_device_module(self.device).set_rng_state(self.on_device, *_place(self.device))
        if _python.state() is not self.python:  # it is the same object where nobody has drawn
            random.setstate(self.python)
        if self.numpy is not None and "numpy" in sys.modules and _numpy.state() is not self.numpy:
            sys.modules["numpy"].random.set_state(self.numpy)


class _NumpyStream:
    """NumPy's global stream, whose state is read only when it has moved.

    Reading it takes NumPy longer than a small layer takes to run, and hardly any model draws from it. So the
    generator's bytes are compared with those of the last time. They tell all, unless a normal number is kept in
    reserve, as the state says.
    """

    def __init__(self) -> None:
        self._generator: Any = None
        self._seen = b""
        self._state: Any = None

    def state(self) -> Any:
        """Return the state, or None where NumPy is not loaded."""
        numpy: Any = sys.modules.get("numpy")
        if numpy is None:
            return None
        generator = numpy.random.get_bit_generator()
        if type(generator).__name__ != "MT19937":
            return numpy.random.get_state(legacy=False)
        seen = ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)
        if generator is not self._generator or seen != self._seen or self._state["has_gauss"]:
            self._generator, self._seen, self._state = generator, seen, numpy.random.get_state(legacy=False)
        return self._state


class _PythonStream:
    """The global stream of Python's `random`, which is read the same way: as a tuple of 625 numbers only when it moved.

    Its bytes follow the head of the object in CPython. Whether they do here is seen once; elsewhere the tuple is read.
    """

    def __init__(self) -> None:
        self._source: Any = getattr(random, "_inst", None)
        self._seen = b""
        self._state: Any = None
        state = random.getstate()
        self._told = self._source is not None and sys.implementation.name == "cpython"
        if self._told:
            index, *words = struct.unpack("=625I", self._bytes())
            self._told = state[1] == (*words, index)

    def state(self) -> Any:
        if not self._told or getattr(random, "_inst", None) is not self._source:
            return random.getstate()
        seen = self._bytes()
        if seen != self._seen or self._state[2] != getattr(self._source, "gauss_next", None):
            self._seen, self._state = seen, random.getstate()
        return self._state

    def _bytes(self) -> bytes:
        return ctypes.string_at(id(self._source) + object.__basicsize__, _MT19937_BYTES)


_MT19937_BYTES = 625 * 4


def _same(one: Any, other: Any) -> bool:
    """Whether two states are equal, made of dicts, tuples, arrays and numbers."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return _same(tuple(one.items()), tuple(other.items()))
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool((one == other).all()) if hasattr(one, "all") else bool(one == other)


_numpy = _NumpyStream()
_python = _PythonStream()


def _place(device: torch.device | None) -> tuple[torch.device, ...]:
    """How a random stream is named to its module: by device, but Metal has only one."""
    return () if device is None or device.type == "mps" else (device,)
