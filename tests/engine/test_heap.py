"""A micro-batch takes the memory that the last one has freed."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from torch import nn
import wholebatch as wb

torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(64, 2048), nn.GELU(), nn.Linear(2048, 1))
accumulator = wb.Accumulator(
    model,
    torch.optim.SGD(model.parameters(), lr=0.1),
    lambda model, x: model(x).square().mean(),
    micro_batch=wb.Rows(128),
    memory={memory!r},
    check=None,
)
for length in (512, 384, 512):
    accumulator.step(torch.ones(length, 64))
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    accumulator.step(torch.ones(512, 64))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


def faults(memory: str | None) -> int:
    """Return the pages that the kernel has to give to a child process in an update, at the least."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(memory=memory)], capture_output=True, text=True, check=True, timeout=60
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide otherwise")
def test_freed_memory_is_kept_for_the_next_micro_batch_unless_there_is_a_budget() -> None:
    assert faults(None) < 20
    assert faults("8GiB") > 200
