"""How is what an optimizer moves put back? Copies of tensors, and of the containers that hold them.

A copy lives beside its tensor, or away from the device where memory is short: in host memory for an accelerator, in a
temporary file for a CPU. A file takes no address space and no memory that the kernel could not take back.
"""

import ctypes
import dataclasses
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wholebatch.engine import memory

SMALL = 16 << 10
"""Bytes up to which a tensor has a copy of its own beside it: less than that is not worth a place elsewhere."""

ALIGNED = 64
"""Copies begin at multiples of so many bytes."""


class Beside:
    """Room for copies on the device of their tensors, one stretch of memory that is used again and again."""

    def __init__(self) -> None:
        self._memory: dict[torch.device, Tensor] = {}
        self._ends: dict[torch.device, int] = {}

    def reserve(self, tensors: Sequence[Tensor]) -> None:
        """Let the next copies, of these tensors, take the places of the last ones."""
        needs: dict[torch.device, int] = {}
        for tensor in tensors:
            if nbytes_of(tensor) > SMALL:
                needs[tensor.device] = needs.get(tensor.device, 0) + nbytes_of(tensor) + ALIGNED
        for device, nbytes in needs.items():
            if device not in self._memory or self._memory[device].nbytes < nbytes:
                self._memory.pop(device, None)
                self._memory[device] = torch.empty(nbytes, dtype=torch.uint8, device=device)
            self._ends[device] = 0

    def copy(self, tensor: Tensor) -> Callable[[], None]:
        """Copy a tensor, and return what puts the copy back."""
        if nbytes_of(tensor) <= SMALL or not fills_its_memory(tensor):
            copy = tensor.detach().clone()
        else:
            start = self._ends[tensor.device]
            copy = self._memory[tensor.device][start : start + tensor.nbytes].view(tensor.dtype)
            copy = copy.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
            self._ends[tensor.device] = start + -(-tensor.nbytes // ALIGNED) * ALIGNED
        return lambda: _put(tensor, copy)

    def give_back(self, above: int) -> None:
        """Free the memory, if it is more than some bytes."""
        if sum(each.nbytes for each in self._memory.values()) > above:
            self._memory.clear()


class Away:
    """Room for copies that are not on the device, used again and again.

    The order of copies and of what moves the originals is that of the device's stream, so nothing waits.
    """

    def __init__(self) -> None:
        self._file: Any = None
        self._end = 0
        self._hosts: list[Tensor] = []
        self._used = 0

    def reserve(self, _tensors: Sequence[Tensor]) -> None:
        """Let the next copies take the places of the last ones."""
        self._end = self._used = 0

    def copy(self, tensor: Tensor) -> Callable[[], None]:
        """Copy a tensor, and return what puts the copy back.

        Raises:
            OSError: The file system is full.
        """
        if tensor.device.type != "cpu":
            return self._copy_to_host(tensor)
        if nbytes_of(tensor) <= SMALL or not fills_its_memory(tensor):
            copy = tensor.detach().clone()
            return lambda: _put(tensor, copy)
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - as long as this object lives
            weakref.finalize(self, self._file.close)
        start = self._end
        self._file.seek(start)
        left = _bytes_of(tensor)
        while left:
            left = left[self._file.write(left) :]
        self._end = start + tensor.nbytes

        def put_back() -> None:
            self._file.seek(start)
            left = _bytes_of(tensor)
            while left:
                left = left[self._file.readinto(left) :]
            torch.autograd.graph.increment_version(tensor)

        return put_back

    def _copy_to_host(self, tensor: Tensor) -> Callable[[], None]:
        if self._used == len(self._hosts) or not _alike(self._hosts[self._used], tensor):
            self._hosts[self._used :] = [_host_memory(tensor)]
        host = self._hosts[self._used]
        self._used += 1
        host.copy_(tensor, non_blocking=True)
        return lambda: _put(tensor, host)


class Undo:
    """What some optimizers are about to change, so that it can be put back: tensors, and what is in which container.

    Args:
        roots: Tensors, and dicts, lists, tuples, sets, dataclasses and optimizers of them, as deep as they go. Of
            everything else, numbers above all, it is remembered which one was where, but for plain attributes of an
            optimizer: its state is what it keeps in ``state``, in its groups, and in tensors.
        forgetting: Pairs of a dict and a key; a key that the dict does not have now is taken out of it again.
        room: Where the copies live.
        other: Where they live if that is full.

    Raises:
        Exception: There is no memory for the copies. Nothing has been changed.
    """

    def __init__(
        self,
        roots: Iterable[Any],
        room: Beside | Away,
        *,
        forgetting: Iterable[tuple[dict[Any, Any], Any]] = (),
        other: Beside | Away | None = None,
    ) -> None:
        self._containers: list[Callable[[], None]] = []
        self._news = [(holder, key) for holder, key in forgetting if key not in holder]
        tensors = self._walk(roots)
        with torch.no_grad():
            try:
                self._copies = _copied(tensors, room)
            except Exception as error:
                if other is None or not (isinstance(error, OSError) or memory.is_out_of_memory(error)):
                    raise
                self._copies = {}
            if not self._copies and other is not None:
                self._copies = _copied(tensors, other)
        self._tensors = tensors  # whose ids are in use as long as they live

    def put_back(self) -> None:
        """Put back everything."""
        with torch.no_grad():
            for put in self._copies.values():
                put()
        for put in self._containers:
            put()
        for holder, key in self._news:
            holder.pop(key, None)

    def put_back_state(self, state: dict[Any, Any], parameters: Sequence[nn.Parameter]) -> None:
        """Put back some parameters and their state, which the roots held.

        Args:
            state: The optimizer's.
            parameters: Which.
        """
        new = {id(key) for holder, key in self._news if holder is state}
        for parameter in parameters:
            if id(parameter) in new:
                state.pop(parameter, None)
        values = [value for parameter in parameters for value in state.get(parameter, {}).values()]
        with torch.no_grad():
            for tensor in [*parameters, *(parameter.grad for parameter in parameters), *values]:
                if id(tensor) in self._copies:
                    self._copies[id(tensor)]()

    def _walk(self, roots: Iterable[Any]) -> list[Tensor]:
        """Remember every container below the roots, and return every tensor, each once."""
        tensors: dict[int, Tensor] = {}
        seen: set[int] = set()
        ahead = list(roots)
        while ahead:
            value = ahead.pop()
            if isinstance(value, Tensor):
                tensors[id(value)] = value
                continue
            if isinstance(value, _PLAIN) or id(value) in seen:
                continue
            taken = _take_apart(value)
            if taken is not None:
                inside, put = taken
                seen.add(id(value))
                ahead.extend(inside)
                if put is not None:
                    self._containers.append(put)
        return list(tensors.values())


_PLAIN = (int, float, str, type(None), complex, torch.device, torch.dtype)

_Taken: TypeAlias = tuple[Iterable[Any], Callable[[], None] | None]


def _take_apart(value: Any) -> _Taken | None:
    """What is in a container, and what makes it hold that again; None for what is no container."""
    if isinstance(value, dict):
        entries = dict(value)
        return entries.values(), lambda: _refill(value, value.update, entries)
    if isinstance(value, list | deque):
        places = list(value)
        return places, lambda: _refill(value, value.extend, places)
    if isinstance(value, set):
        members = set(value)
        return members, lambda: _refill(value, value.update, members)
    if isinstance(value, tuple | frozenset):
        return value, None
    if isinstance(value, Optimizer):
        held = {name: entry for name, entry in vars(value).items() if not isinstance(entry, _PLAIN)}
        return held.values(), lambda: _reset(value, held)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return fields.values(), lambda: _reset(value, fields)
    return None


def nbytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's numbers; of a sparse one those of the dense tensor that it stands for."""
    return tensor.numel() * tensor.element_size()


def _refill(container: Any, fill: Callable[[Any], object], content: Any) -> None:
    container.clear()
    fill(content)


def _reset(value: Any, fields: dict[str, Any]) -> None:
    for name, entry in fields.items():
        if getattr(value, name, None) is not entry:
            object.__setattr__(value, name, entry)


def _copied(tensors: Sequence[Tensor], room: Beside | Away) -> dict[int, Callable[[], None]]:
    room.reserve(tensors)
    return {id(tensor): room.copy(tensor) for tensor in tensors}


def _put(tensor: Tensor, copy: Tensor) -> None:
    tensor.copy_(copy, non_blocking=True)


def _alike(host: Tensor, tensor: Tensor) -> bool:
    return host.shape == tensor.shape and host.dtype == tensor.dtype and host.stride() == tensor.stride()


def _host_memory(tensor: Tensor) -> Tensor:
    """Host memory for a tensor of an accelerator, from which it can be copied without waiting where that exists."""
    host = torch.empty_like(tensor, device="cpu")
    try:
        return host.pin_memory() if tensor.device.type in ("cuda", "xpu") else host
    except RuntimeError as error:
        if not memory.is_out_of_memory(error):
            raise
        return host


def fills_its_memory(tensor: Tensor) -> bool:
    """Return whether a tensor is one stretch of memory without holes."""
    if tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        return False
    return tensor.is_contiguous() or (
        tensor.ndim in (4, 5)
        and tensor.is_contiguous(
            memory_format=torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d,
        )
    )


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor on a CPU, to be read and written."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
