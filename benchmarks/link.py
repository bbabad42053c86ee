"""What lies between two machines? Two network namespaces on one, and a link of known bandwidth and latency.

Each namespace has a TUN device, and one process carries packets from one to the other: as many bits a second as the
link has, each so much later. Nothing is lost, and both directions work at once. So the link needs nothing from the
kernel but TUN: the ``netem`` of ``tc``, which is usual for latency, is a module that many kernels lack. Packets are
carried as TCP makes them, up to 64 KiB at once, so that carrying 1 Gbit/s takes the process little time.

The process runs in a user namespace (``unshare --map-root-user``), where nobody has to be root.
"""

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

DEVICE = "wb0"
"""The network device of each side."""

ADDRESSES = ("10.77.0.1", "10.77.0.2")
"""Of the two sides."""

_NEW_NETWORK = 0x40000000
_HEADER = 10  # virtio_net_hdr, before each packet


@dataclass(frozen=True, slots=True)
class Speed:
    """What a link can do.

    Attributes:
        bits: In each direction. Unit: bits a second.
        latency: From one side to the other. Unit: seconds.
    """

    bits: float
    latency: float

    def __str__(self) -> str:
        bits = f"{self.bits / 1e9:g} Gbit/s" if self.bits >= 1e9 else f"{self.bits / 1e6:g} Mbit/s"
        return f"{bits}, {self.latency * 1e3:g} ms"


@contextlib.contextmanager
def link(speed: Speed) -> Iterator[tuple[list[str], list[str]]]:
    """Lay a link, and yield for each side the command before a command that runs there.

    Args:
        speed: What it can do.

    Raises:
        RuntimeError: This machine has no namespaces or no TUN for whoever runs this.
    """
    carrier = subprocess.Popen(
        ["unshare", "--map-root-user", "--net", sys.executable, __file__, str(speed.bits), str(speed.latency)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert carrier.stdout is not None
    assert carrier.stdin is not None
    try:
        said = carrier.stdout.readline().split()
        if len(said) != 3:
            raise RuntimeError("no link: two network namespaces with TUN devices could not be made here")
        carries, *sides = said
        enter = ["nsenter", f"--user=/proc/{carries}/ns/user", "--preserve-credentials"]
        first, second = ([*enter, f"--net=/proc/{carries}/fd/{side}"] for side in sides)
        yield first, second
    finally:
        carrier.stdin.close()  # it ends when nobody holds this any more
        carrier.wait()


def _device(address: str) -> int:
    """Make a TUN device in the namespace that this process is in, and return the file of its packets."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    tun, no_information, with_header = 0x0001, 0x1000, 0x4000
    fcntl.ioctl(device, 0x400454CA, struct.pack("16sH22x", DEVICE.encode(), tun | no_information | with_header))
    checksums, large = 0x01, 0x02 | 0x04
    fcntl.ioctl(device, 0x400454D0, checksums | large)
    for command in (
        ["link", "set", "lo", "up"],
        ["address", "add", f"{address}/24", "dev", DEVICE],
        ["link", "set", DEVICE, "up", "txqueuelen", "10000"],
    ):
        subprocess.run(["ip", *command], check=True)
    # What fast links with long ways need: buffers of twice what is on the way.
    for name in ("tcp_rmem", "tcp_wmem"):
        Path("/proc/sys/net/ipv4", name).write_text("4096 1048576 33554432")
    return device


def carry(ends: Sequence[int], speed: Speed, until: int) -> None:
    """Carry packets from each end to the other until a file ends.

    Args:
        ends: The two TUN devices.
        speed: How fast.
        until: Read until its end.
    """
    waiting: dict[int, deque[tuple[float, bytes]]] = {end: deque() for end in ends}
    free = dict.fromkeys(ends, 0.0)
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    while True:
        due = min((queue[0][0] for queue in waiting.values() if queue), default=None)
        pause = None if due is None else max(0.0, due - time.perf_counter())
        ready, _, _ = select.select([*ends, until], [], [], pause)
        if until in ready and not os.read(until, 1):
            return
        now = time.perf_counter()
        for end in ends:
            if end in ready:
                with contextlib.suppress(BlockingIOError):
                    for _ in range(64):
                        packet = os.read(end, 1 << 17)
                        free[end] = max(now, free[end]) + (len(packet) - _HEADER) * 8 / speed.bits
                        waiting[other[end]].append((free[end] + speed.latency, packet))
        for end, queue in waiting.items():
            while queue and queue[0][0] <= now:
                os.write(end, queue.popleft()[1])


def main() -> None:
    bits, latency = map(float, sys.argv[1:])
    ends, sides = [], []
    for place, address in enumerate(ADDRESSES):
        if place:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(_NEW_NETWORK):
                raise OSError(ctypes.get_errno(), "no second network namespace")
        sides.append(os.open("/proc/self/ns/net", os.O_RDONLY))
        ends.append(_device(address))
    print(os.getpid(), *sides, flush=True)
    carry(ends, Speed(bits, latency), sys.stdin.fileno())


if __name__ == "__main__":
    main()
