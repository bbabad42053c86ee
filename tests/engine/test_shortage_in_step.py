"""Memory that really runs out inside optimizer.step(), in a child process with a limited address space."""

import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, which only Linux enforces")

CHILD = """
import copy, resource, sys
import torch
from torch import nn
import wholebatch as wb
from wholebatch.engine import memory
from wholebatch.engine.steps import stepping

stepping.WAITS = (0.0, 0.0)
torch.set_num_threads(1)
kind, shortage = sys.argv[1:]


class Mine(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                state["mean"].lerp_(parameter.grad, 0.1)
                parameter.sub_(state["mean"].abs().add_(1e-8).rsqrt_().mul_(state["mean"]), alpha=group["lr"])


make = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "one's own": lambda p: Mine(p, lr=1e-3),
}[kind]


def used():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()


def limit(bytes_more):
    most = resource.RLIM_INFINITY if bytes_more is None else used() + bytes_more
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def fresh():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(6)))
    optimizer = make(model.parameters())
    accumulator = wb.Accumulator(
        model, optimizer, lambda model, x: model(x).square().mean(), micro_batch=wb.Rows(2), check=None
    )
    return model, optimizer, accumulator


rows = torch.randn(4, 1024)
cpu = torch.device("cpu")
model, optimizer, accumulator = fresh()
before = copy.deepcopy(model.state_dict())
step = accumulator._setup.update.step

if shortage == "stays":
    # So little, from where the step begins, that no update can be made: nothing may be left of it.
    def short():
        memory.release(cpu)  # the C library keeps what was freed, beyond the limit
        limit(2 << 20)
        try:
            return step()
        finally:
            limit(None)

    accumulator._setup.update.step = short
    try:
        accumulator.step(rows)
    except wb.OutOfMemoryError:
        pass
    else:
        raise AssertionError("there was enough memory")
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert not optimizer.state
    accumulator._setup.update.step = step
    updates = [accumulator.step(rows) for _ in range(3)]
else:
    # When three pieces have moved, a neighbour takes all memory, again and again, and keeps it.
    updates = [accumulator.step(rows), accumulator.step(rows)]
    plain, moved = stepping.Piece.step, []

    def counted(piece):
        if len(moved) > 2:
            memory.release(cpu)
            limit(0)
        plain(piece)
        moved.append(piece)

    def stepped():
        try:
            return step()
        finally:
            limit(None)

    stepping.Piece.step = counted
    accumulator._setup.update.step = stepped
    updates.append(accumulator.step(rows))
    stepping.Piece.step = plain
    assert updates[2].retries == 0
    assert len(moved) > 2

right, steps, plainly = fresh()
for update in updates:
    plainly._cutting.micro_batch = wb.Rows(4 // update.micro_batches)
    plainly.step(rows)
assert all(torch.equal(right.state_dict()[name], model.state_dict()[name]) for name in before)
for weight, other in zip(right.parameters(), model.parameters()):
    assert all(torch.equal(steps.state[weight][name], value) for name, value in optimizer.state[other].items())
"""


@pytest.mark.parametrize(
    ("kind", "shortage"),
    [
        ("AdamW", "stays"),
        ("AdamW, foreach", "stays"),
        ("one's own", "stays"),
        ("AdamW", "later"),
        ("AdamW, foreach", "later"),
    ],
)
def test_a_real_shortage_inside_the_step_is_an_update_or_none(kind, shortage):
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), kind, shortage],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
