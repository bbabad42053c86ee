"""How much memory is left? Of a device, a machine, a control group, an address space."""

import os
import sys
from pathlib import Path

import torch

if sys.platform == "linux":
    import resource


def available_bytes(device: torch.device) -> int:
    """Return what a device leaves to this process, beyond what it holds already; careful on a CPU.

    Args:
        device: Where the weights live. On a CPU it is four fifths of the least that the machine, the control group and
            the limit of the address space leave; half of the last, since allocators reserve more than they use. What
            the machine leaves is shared by the ranks that torchrun has started on it.

    Returns:
        Unit: bytes.

    Example:
        >>> available_bytes(torch.device("cpu")) > 0
        True
    """
    if device.type in ("cuda", "xpu"):
        module = torch.get_device_module(device)
        free, _ = module.mem_get_info(device)
        kept: int = module.memory_reserved(device) - module.memory_allocated(device)
        return int(0.95 * (free + kept))
    if device.type == "mps":
        return int(0.8 * (torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()))
    here = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # ranks that share this machine
    left = [int(0.8 * each) // here for each in (_machine_bytes(), _group_bytes()) if each is not None]
    address = _address_bytes()
    left += [address // 2] if address is not None else []
    return max(0, min(left)) if left else 1 << 32


def _machine_bytes() -> int | None:
    """What the machine has free, caches included."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123 - read at every plan
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


GROUPS = Path("/sys/fs/cgroup")
"""Where control groups are mounted."""

OWN_GROUP = Path("/proc/self/cgroup")
"""Where it is told in which of them this process is."""


def _group_bytes() -> int | None:
    """What the control groups of this process leave, in either version; None: no limit, or no control groups.

    Each group above it has a limit of its own. What they keep of files that the kernel could drop is not counted.
    """
    left: list[int] = []
    for folder, limit, usage in _group_files():
        try:
            said = (folder / limit).read_text(encoding="ascii").strip()
            used = int((folder / usage).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
        if said.isdigit() and int(said) < 1 << 60:
            left.append(int(said) - max(0, used - _dropped_bytes(folder / "memory.stat")))
    return min(left) if left else None


def _group_files() -> list[tuple[Path, str, str]]:
    """The groups of this process, each with the names of its files."""
    second, first = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    found: list[tuple[Path, str, str]] = [
        (GROUPS, *second),
        (GROUPS / "memory", *first),
    ]  # seen from inside a container
    try:
        lines = OWN_GROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in lines:
        _, kinds, path = line.split(":", 2)
        parts = Path(path.lstrip("/")).parts
        for depth in range(len(parts), 0, -1):
            if not kinds:
                found += [(mount.joinpath(*parts[:depth]), *second) for mount in (GROUPS, GROUPS / "unified")]
            elif "memory" in kinds.split(","):
                found.append(((GROUPS / "memory").joinpath(*parts[:depth]), *first))
    return found


def _dropped_bytes(stat: Path) -> int:
    """What a group holds of files that have not been used lately."""
    try:
        for line in stat.read_text(encoding="ascii").splitlines():
            name, _, size = line.partition(" ")
            if name in ("total_inactive_file", "inactive_file"):  # the first is that of the older version
                return int(size)
    except (OSError, ValueError):
        pass
    return 0


def _address_bytes() -> int | None:
    """What the limit of the address space leaves; None: no limit."""
    if sys.platform != "linux":
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    return limit - used
