"""Where do activations wait for the backward pass? In a file, where a CPU has too little memory for them."""

import ctypes
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

LEAST_BYTES = 64 << 10
"""What is smaller stays in memory: reading it back would take longer than it is worth. Unit: bytes."""


@contextmanager
def offload_to_file(folder: str | Path | None = None) -> Iterator[None]:
    """Let what forward passes inside the block save for their backward passes wait in a file.

    For joined graphs on a CPU, as with exact batch norm: they hold the activations of the whole logical batch. Results
    are the same bit for bit. Each large tensor is written once and read as often as it is used, so the price is the
    disk's: more than the computation itself where a model computes little with large activations. Weights, and tensors
    below 64 KiB, stay in memory; so does what is on an accelerator, from where it goes to the host's memory by itself.

    Args:
        folder: Where to; it should be on a disk, not in memory. Default: the system's folder for temporary files. The
            file has no name, is overwritten window by window and is gone after the block.

    Raises:
        OSError: The file cannot be made, or the disk is full: the window is rolled back.

    Example:
        >>> import wholebatch as wb
        >>> model = wb.exact_batch_norm(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> accumulator = wb.Accumulator(model, optimizer, lambda model, x: model(x).mean(), micro_batch=wb.Rows(2))
        >>> with offload_to_file():
        ...     accumulator.step(torch.randn(6, 3)).applied
        True
    """
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        kept = _Kept(file)
        with saved_tensors_hooks(kept.pack, kept.unpack):
            yield


class _Place:
    """Where a tensor lies in the file."""

    __slots__ = ("__weakref__", "dtype", "format", "shape", "start")

    def __init__(self, start: int, tensor: Tensor, form: torch.memory_format) -> None:
        self.start = start
        self.shape, self.dtype, self.format = tensor.shape, tensor.dtype, form


class _Kept:
    """Tensors in a file, whose room is used again when none of them is wanted any more."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._lock = threading.RLock()
        self._end = 0
        self._live = 0
        self._known: dict[int, tuple[Any, int, tuple[Any, ...], Any]] = {}

    def pack(self, tensor: Tensor) -> Any:
        """Write a tensor, unless it is small, a weight, or somewhere else; return what brings it back."""
        if not _goes(tensor):
            return tensor
        with self._lock:
            storage = tensor.untyped_storage()
            layout = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
            known = self._known.get(id(storage))
            if known is not None and known[0]() is storage and known[1:3] == (tensor._version, layout):
                place = known[3]()
                if place is not None:
                    return place
            place = self._write(tensor.detach())
            self._known[id(storage)] = weakref.ref(storage), tensor._version, layout, weakref.ref(place)
        return place

    def unpack(self, packed: Any) -> Tensor:
        """Return a tensor that was packed."""
        if isinstance(packed, Tensor):
            return packed
        found = torch.empty(packed.shape, dtype=packed.dtype, memory_format=packed.format)
        with self._lock:
            self._file.seek(packed.start)
            ahead = _bytes_of(found)
            while ahead:
                ahead = ahead[self._file.readinto(ahead) :]
        return found

    def _write(self, tensor: Tensor) -> _Place:
        if self._live == 0:
            self._end = 0
            self._known.clear()
        form = _format_of(tensor)
        tensor = tensor.contiguous(memory_format=form)
        place = _Place(self._end, tensor, form)
        self._file.seek(self._end)
        ahead = _bytes_of(tensor)
        while ahead:
            ahead = ahead[self._file.write(ahead) :]
        self._end += tensor.numel() * tensor.element_size()
        self._live += 1
        weakref.finalize(place, self._forget)
        return place

    def _forget(self) -> None:
        with self._lock:
            self._live -= 1


def _goes(tensor: Tensor) -> bool:
    if type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return False
    origin = tensor._base if tensor._is_view() and tensor._base is not None else tensor
    is_weight = origin.is_leaf and origin.requires_grad
    return not is_weight and tensor.numel() * tensor.element_size() >= LEAST_BYTES


def _format_of(tensor: Tensor) -> torch.memory_format:
    """The order of a tensor's numbers in memory, as far as it has a name."""
    for ndim, form in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.ndim == ndim and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=form):
            return form
    return torch.contiguous_format


def _bytes_of(tensor: Tensor) -> memoryview:
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")
