"""What did that cost? Peak memory of a device, and of the tensors alone."""

import ctypes
import gc
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import torch

from wholebatch.core.errors import OutOfMemoryError, RankError
from wholebatch.core.trace import Kind, Trace
from wholebatch.engine.profiling import AFTER, BETWEEN, changes_of, profiled

if sys.platform == "linux":
    import resource


def reset_peak(device: torch.device) -> None:
    """Start a new peak, so that `peak_bytes` speaks of what comes after.

    Args:
        device: Where the weights live. On a CPU the kernel's high-water mark of this process is reset (Linux only).
    """
    if device.type == "cpu":
        process = _process(os.getpid())
        if process is not None:
            process.reset_peak()
    elif device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "xpu":
        torch.xpu.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Return the highest memory use since `reset_peak`.

    Args:
        device: Where the weights live.

    Returns:
        What was allocated on a CUDA, ROCm or XPU device at most; on a CPU the largest resident size of this process;
        None where the platform does not tell. Unit: bytes.

    Example:
        >>> peak_bytes(torch.device("meta")) is None
        True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "xpu":
        return torch.xpu.max_memory_allocated(device)
    process = _process(os.getpid()) if device.type == "cpu" else None
    return process.peak_bytes() if process is not None else None


def release(device: torch.device) -> None:
    """Give memory that nobody uses any more back to the system, where the C library keeps it: on a CPU with glibc.

    Freed pieces of many sizes are kept for later, and the resident size grows although the tensors' does not. It takes
    milliseconds, so it is for between two updates, not for inside one.

    Args:
        device: Where the weights live.
    """
    if device.type == "cpu" and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


_SAID_OUT_OF_MEMORY = re.compile(
    r"""
    out\ of\ memory                # CUDA, HIP and XPU; MPS says "MPS backend out of memory"
    | OUT_OF_(DEVICE|HOST)_MEMORY  # Level Zero and OpenCL, under XPU
    | OutOfMemory                  # hipErrorOutOfMemory, cudaErrorMemoryAllocation's newer name
    | ErrorMemoryAllocation
    | CUBLAS_STATUS_ALLOC_FAILED | HIPBLAS_STATUS_ALLOC_FAILED | CUSOLVER_STATUS_ALLOC_FAILED
    | CUDNN_STATUS_(ALLOC_FAILED|NOT_SUPPORTED)  # the second as well, where a workspace could not be had
    | miopenStatusAllocFailed
    | can't\ allocate\ memory | cannot\ allocate\ memory      # DefaultCPUAllocator on Linux and macOS
    | not\ enough\ memory         # DefaultCPUAllocator on Windows
    | std::bad_alloc
    | could\ not\ create\ a\ (memory|primitive(?!\ desc))     # oneDNN, which says no more; a descriptor is no memory
    """,
    re.VERBOSE | re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory ran out, in any of the many ways in which this is said.

    Args:
        error: What was raised; an error that was raised from one of memory counts as well.

    Example:
        >>> is_out_of_memory(RuntimeError("CUDA error: out of memory")), is_out_of_memory(ValueError("no memory"))
        (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, RankError):  # it may tell of memory, but not of this process's
        return False
    if isinstance(error, RuntimeError) and _SAID_OUT_OF_MEMORY.search(str(error)):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def in_a_line(error: BaseException) -> str:
    """Return what an exception says, without the tensors that its traceback holds alive.

    Example:
        >>> in_a_line(MemoryError()), in_a_line(ValueError("one\\ntwo"))
        ('MemoryError', 'one')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def said_of_shortage(error: Exception) -> str:
    """Return what an error says of memory that ran out. Only these words may leave the block that caught it.

    Raises:
        Exception: The error itself, if it speaks of something else, or of a shortage that has been dealt with.
    """
    if not is_out_of_memory(error) or isinstance(error, OutOfMemoryError):
        try:
            raise error
        finally:
            del error  # or it and this frame would keep each other, and what the traceback holds
    return in_a_line(error)


def kind_in_a_line(error: BaseException) -> str:
    """Return what kind of exception it is and what it says, in at most 160 characters.

    Example:
        >>> kind_in_a_line(ValueError("one\\ntwo"))
        'ValueError: one'
    """
    return f"{type(error).__name__}: {in_a_line(error)}"[:160]


def free_cached(device: torch.device) -> None:
    """Give back what the allocator keeps for later, after memory has run out and the tensors are gone.

    Args:
        device: Where the weights live.
    """
    gc.collect()
    if device.type in ("cuda", "xpu", "mps"):
        torch.get_device_module(device).empty_cache()
    release(device)


class _Process:
    """This process, as the Linux kernel counts its memory.

    Raises:
        OSError: The kernel does not tell, or a sandbox forbids to ask.
    """

    def __init__(self) -> None:
        self._clear_refs = os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
        self._status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
        self.reset_peak()
        # getrusage tells the same in a fiftieth of the time, but never less than the program that started this one
        # took.
        self._floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self._floor <= self._high_water_mark() + (1 << 20):
            self._floor = 0

    def reset_peak(self) -> None:
        os.write(self._clear_refs, b"5")

    def peak_bytes(self) -> int:
        peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return peak if peak > self._floor else self._high_water_mark()

    def _high_water_mark(self) -> int:
        _, found, after = os.pread(self._status, 4096, 0).partition(b"VmHWM:")
        if not found:
            raise OSError("this kernel keeps no high-water mark")
        return int(after.split(maxsplit=1)[0]) * 1024


@cache
def _process(_pid: int) -> _Process | None:
    """The process of this number; a forked child must not reset its parent's peak."""
    if sys.platform != "linux":
        return None
    try:
        return _Process()
    except OSError:
        return None


@dataclass(slots=True)
class TensorPeak:
    """What the tensors of a piece of code took.

    Attributes:
        peak_bytes: The most that was live at once, above what was live at the start. Unit: bytes.
        left_bytes: What is still live at the end. Unit: bytes.
    """

    peak_bytes: int = 0
    left_bytes: int = 0


@contextmanager
def tensor_peak() -> Iterator[TensorPeak]:
    """Count the bytes that tensors take on a CPU, whatever the C allocator keeps for itself.

    PyTorch's profiler sees every allocation and release of a tensor's memory; their running sum is the live size. It
    slows the code and takes memory of its own that grows with the number of operations, so it measures, it does not
    watch.

    Yields:
        A `TensorPeak`, filled in at the end of the block.

    Example:
        >>> with tensor_peak() as peak:
        ...     x = torch.zeros(1000, dtype=torch.float64)
        >>> peak.peak_bytes, peak.left_bytes
        (8000, 8000)
    """
    peak = TensorPeak()
    with profiled() as profile:
        yield peak
    for _, change, _ in changes_of(profile):
        peak.left_bytes += change
        peak.peak_bytes = max(peak.peak_bytes, peak.left_bytes)


_SCRATCH: Kind = "scratch"


def trace_peaks(device: torch.device, runs: Sequence[Callable[[Callable[[], None]], None]]) -> list[Trace] | None:
    """Return what came and went while each of some things ran, everything included that kernels take for themselves.

    Args:
        device: Where the weights live. On a CPU every change is told, on CUDA and XPU the peak of each half.
        runs: Each takes a function that it calls between its two halves.

    Returns:
        None where the device does not tell, or where a profile is under way already. What was taken is of the kind
        ``"scratch"``.
    """
    if device.type in ("cuda", "xpu"):
        return [_peaks_of_halves(device, run) for run in runs]
    if device.type != "cpu" or torch._C._autograd._profiler_enabled():
        return None
    with profiled() as profile:  # one for all: its start and its end take longer than some of them
        for run in runs:
            run(partial(_mark, BETWEEN))
            _mark(AFTER)
    traces: list[Trace] = []
    changes: list[int] = []
    second: int | None = None
    for _, change, name in changes_of(profile):
        if name == BETWEEN:
            second = len(changes)
        elif name == AFTER:
            kinds = (_SCRATCH,) * len(changes)
            traces.append(Trace(tuple(changes), kinds, len(changes) if second is None else second))
            changes, second = [], None
        elif change:
            changes.append(change)
    return traces


def _mark(name: str) -> None:
    """Let the profiler see a mark."""
    with torch.profiler.record_function(name):
        pass


def _peaks_of_halves(device: torch.device, run: Callable[[Callable[[], None]], None]) -> Trace:
    """The same of a device that keeps a high-water mark."""
    before = torch.get_device_module(device).memory_allocated(device)
    peaks: list[int] = []

    def between() -> None:
        peaks.append((peak_bytes(device) or 0) - before)
        reset_peak(device)

    reset_peak(device)
    run(between)
    between()
    changes = [change for peak in peaks for change in (peak, -peak)]
    return Trace(tuple(changes), (_SCRATCH,) * len(changes), 2)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was told; a CPU has."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(*(() if device.type == "mps" else (device,)))


def allocation_retries(device: torch.device) -> int | None:
    """Return how often an allocator had to give everything back and ask the device again, since the process began.

    A few at the start are usual. One in every window says that the micro-batch fits only just: each costs a wait for
    the device.

    Args:
        device: Where the weights live.

    Returns:
        None where the device keeps no count.

    Example:
        >>> allocation_retries(torch.device("cpu")) is None
        True
    """
    if device.type not in ("cuda", "xpu"):
        return None
    return int(torch.get_device_module(device).memory_stats(device).get("num_alloc_retries", 0))
