"""A micro-batch takes the memory that the last one has freed."""

import platform
import subprocess
import sys

import pytest

from wholebatch.engine import heap

FAULTS = """
import resource
import torch
from torch import nn
from wholebatch.engine import heap
import wholebatch as wb

torch.set_num_threads(1)
layers = [layer for _ in range(16) for layer in (nn.Linear(64, 64), nn.GELU())]
model = nn.Sequential(*layers, nn.Linear(64, 1))
accumulator = wb.Accumulator(
    model,
    torch.optim.SGD(model.parameters(), lr=0.1),
    lambda model, x: model(x).square().mean(),
    micro_batch=wb.Rows(4096),
    memory={memory!r},
    check=None,
)
for number in range(13):
    if number == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    accumulator.step(torch.ones(8192, 64))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(memory: str | None) -> int:
    """Return how many pages the kernel has to give to a child process in ten updates."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(memory=memory)], capture_output=True, text=True, check=True, timeout=300
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide otherwise")
def test_freed_memory_is_kept_for_the_next_micro_batch_unless_there_is_a_budget() -> None:
    assert 3 * faults(None) < faults("8GiB")


def test_where_there_is_no_room_nothing_is_kept(monkeypatch):
    """The block only makes later ones cheaper: its lack is no reason to end."""
    monkeypatch.setattr(heap, "_LARGE_BLOCK", 1 << 60)
    heap.keep_freed_blocks.__wrapped__()
