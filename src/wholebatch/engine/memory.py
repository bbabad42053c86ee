"""What did that cost? Peak memory of a device, and of the tensors alone."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

if sys.platform != "win32":
    import resource


def reset_peak(device: torch.device) -> None:
    """Start a new peak, so that `peak_bytes` speaks of what comes after.

    Args:
        device: Where the weights live. On a CPU the kernel's high-water mark of this process is reset (Linux only).
    """
    if device.type == "cpu":
        handle = _clear_refs(os.getpid())
        if handle is not None:
            os.write(handle, b"5")
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
    if device.type == "cpu" and _clear_refs(os.getpid()) is not None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return None


@cache
def _clear_refs(_process: int) -> int | None:
    """The kernel's switch that resets this process's high-water mark, or None where there is none.

    It is opened once a process: a forked child that wrote to its parent's would reset the wrong one.
    """
    try:
        handle = os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
        os.write(handle, b"5")
    except OSError:  # another platform, or a sandbox that forbids it
        return None
    return handle


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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield peak
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    for _, change in changes:
        peak.left_bytes += change
        peak.peak_bytes = max(peak.peak_bytes, peak.left_bytes)
