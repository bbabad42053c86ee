"""Memory that others take in the middle of a run: seen before it fails where that can be, survived where it fails."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import wholebatch as wb
from wholebatch.engine import memory
from wholebatch.engine.fit import room, watching
from wholebatch.engine.fit.watching import Watch

CPU = torch.device("cpu")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 16))


def accumulator_of(**options):
    model = network()
    return wb.Accumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model, x: model(x).square().mean(),
        check=None,
        **options,
    )


@pytest.fixture
def free(monkeypatch):
    """What is free, as the machine tells it, and a look at it before every logical batch."""
    there = [1 << 30]
    monkeypatch.setattr("wholebatch.engine.fit.fitting.available_bytes", lambda _: there[0])
    monkeypatch.setattr(watching, "available_bytes", lambda _: there[0])
    monkeypatch.setattr(watching, "EVERY", 0.0)
    return there


def cuts(accumulator, times, rows=64):
    return [accumulator.step(torch.ones(rows, 16)).micro_batches for _ in range(times)]


def test_memory_that_others_take_is_seen_before_it_fails_and_grows_back(free):
    accumulator = accumulator_of()
    assert cuts(accumulator, 3) == [1, 1, 1]
    takes = accumulator._cutting._shares[accumulator._cutting._kind].takes
    assert takes(64, 64) > 0.9 * (2 * takes(16, 64) + 1)
    free[0] = 2 * takes(16, 64) + 1
    assert cuts(accumulator, 8) == [4] * 8  # seen at once
    assert "Others have taken memory" in accumulator.reasons[1]
    assert "micro-batches of 16 rows are taken" in accumulator.reasons[1]
    assert len(accumulator.reasons) == 2
    free[0] = 1 << 30
    assert cuts(accumulator, 20)[-1] == 1
    assert any("tried again" in reason for reason in accumulator.reasons)


def test_memory_that_goes_from_look_to_look_is_seen_before_it_is_gone(free):
    accumulator = accumulator_of()
    assert cuts(accumulator, 1) == [1]
    takes = accumulator._cutting._shares[accumulator._cutting._kind].takes(64, 64)
    seen = []
    for times in (10, 10, 2, 2):  # others take at once, and no more
        free[0] = times * takes
        seen += cuts(accumulator, 1)
    assert seen == [1] * 4
    free[0] = int(1.7 * takes)
    seen += cuts(accumulator, 1)
    free[0] = int(1.3 * takes)  # 0.3 less twice, which will be as much as is missing
    seen += cuts(accumulator, 1)
    free[0] = int(1.0 * takes)
    seen += cuts(accumulator, 1)
    assert seen[4:6] == [1, 1]
    assert seen[6] > 1
    assert "less from look to look" in accumulator.reasons[-1]


def test_what_is_free_is_nobodys_concern_under_a_budget(free):
    accumulator = accumulator_of(memory="1GiB")
    cuts(accumulator, 1)
    free[0] = 1
    assert cuts(accumulator, 2) == [1, 1]


def test_a_row_at_a_time_is_as_fine_as_it_gets(free):
    accumulator = accumulator_of()
    cuts(accumulator, 1, rows=4)
    free[0] = 1
    assert cuts(accumulator, 2, rows=4) == [4, 4]


def test_what_the_process_keeps_for_later_is_given_back_first(monkeypatch):
    there = [500]
    monkeypatch.setattr(watching, "available_bytes", lambda _: there[0])
    monkeypatch.setattr(memory, "release", lambda _: there.__setitem__(0, 900))
    watch = Watch(CPU, budgeted=False)
    watch.forget()
    watch.look_again()
    assert watch.short(900) is None
    assert watch.free is None
    there[0] = 500
    watch.look_again()
    assert watch.short(1200) is not None
    assert watch.free == 900


def test_it_looks_no_more_often_than_it_must(monkeypatch):
    looks = []
    monkeypatch.setattr(watching, "available_bytes", lambda _: looks.append(1) or 1)
    watch = Watch(CPU, budgeted=False)
    assert watch.short(10**9) is None  # nothing was planned
    watch.forget()
    for _ in range(100):
        watch.short(10**9)
    assert len(looks) <= 1
    assert watch.short(None) is None


def test_an_allocator_at_its_end_makes_micro_batches_finer(monkeypatch):
    """A counter that only an accelerator has: it rises where memory had to be given back and asked for again."""
    count = [7]
    monkeypatch.setattr(memory, "allocation_retries", lambda _: count[0])
    accumulator = accumulator_of(memory="1GiB")
    assert cuts(accumulator, 3) == [1, 1, 1]
    seen = []
    for _ in range(2):  # a few are usual
        count[0] += 1
        seen += cuts(accumulator, 1)
    seen += cuts(accumulator, 1)
    assert seen == [1, 1, 1]
    for _ in range(3):
        count[0] += 5
        seen += cuts(accumulator, 1)
    assert seen[-1] == 2
    assert "ask the device again in 3 logical batches on end (24 times so far)" in accumulator.reasons[-1]
    assert cuts(accumulator, 3) == [2, 2, 2]


COMMON = """
import resource, sys
import torch
from torch import nn
import wholebatch as wb
from wholebatch.engine import memory
from wholebatch.engine.fit import watching

watching.EVERY = 0.0
torch.set_num_threads(1)
rows = torch.randn(2048, 64, generator=torch.Generator().manual_seed(0))


def fresh(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4096), nn.Dropout(0.1), nn.Tanh(), nn.Linear(4096, 64))
    made = wb.Accumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01),
        lambda model, x: (model(x) - x).square().mean(),
        check=None,
        **options,
    )
    return model, made


def assert_clean(model, updates):
    plain, told = fresh(micro_batch=wb.Rows(1))
    torch.manual_seed(1)
    for update in updates:
        told._cutting.micro_batch = wb.Rows(-(-2048 // update.micro_batches))
        assert told.step(rows).micro_batches == update.micro_batches
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters()))
"""

ADDRESSES = (
    COMMON
    + """
import mmap

def limit(bytes_more):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    most = resource.RLIM_INFINITY if bytes_more is None else used + bytes_more
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))

model, accumulator = fresh(memory="2GiB")
torch.manual_seed(1)
updates = [accumulator.step(rows) for _ in range(2)]
limit(300 << 20)
neighbour = mmap.mmap(-1, 250 << 20)  # in this process, since the limit is on its addresses
updates += [accumulator.step(rows) for _ in range(3)]
neighbour.close()
updates += [accumulator.step(rows) for _ in range(11)]
limit(None)
print([update.micro_batches for update in updates], [update.retries for update in updates])
assert updates[1].micro_batches == 1
assert sum(update.retries for update in updates[2:5]) >= 1
assert updates[-1].micro_batches < updates[4].micro_batches
assert_clean(model, updates)
"""
)


def run(code, *arguments):
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 0, f"{ended.returncode} {ended.stdout} {ended.stderr}"


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, which only Linux enforces")
def test_a_neighbour_that_takes_addresses_and_gives_them_back_costs_attempts_and_no_update():
    run(ADDRESSES)


NEIGHBOUR = """
import sys
held = []
for line in sys.stdin:
    held.append(b"x" * int(line))
    print(len(held), flush=True)
"""

GROUP = (
    COMMON
    + """
import os, subprocess
from pathlib import Path

group, limit, usage, code = Path(sys.argv[1]), *sys.argv[2:]
(group / "cgroup.procs").write_text(str(os.getpid()))
model, accumulator = fresh()
neighbour = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
accumulator.step(rows[:4])
(group / limit).write_text(str(int((group / usage).read_text()) + (400 << 20)))
model, accumulator = fresh()
torch.manual_seed(1)
updates = [accumulator.step(rows) for _ in range(2)]
for _ in range(6):
    neighbour.stdin.write(f"{50 << 20}\\n")
    neighbour.stdin.flush()
    assert neighbour.stdout.readline()
    updates.append(accumulator.step(rows))
neighbour.kill()
neighbour.wait()
(group / limit).write_text(str(1 << 40))
print([update.micro_batches for update in updates], accumulator.reasons)
assert updates[0].micro_batches == updates[1].micro_batches == 1
assert updates[-1].micro_batches > 1
assert all(update.applied for update in updates)
assert any("Others have taken memory" in reason for reason in accumulator.reasons)
"""
)


@pytest.fixture
def group():
    """A control group of memory, and the names of its files; skipped where none can be made."""
    second = room.GROUPS / "cgroup.controllers"
    parent, *names = (
        (room.GROUPS, "memory.max", "memory.current")
        if second.exists()
        else (room.GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    made = parent / f"wholebatch-{os.getpid()}"
    try:
        made.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        if not all((made / name).exists() for name in (*names, "cgroup.procs")):
            pytest.skip(f"control groups do not count memory in {parent}")
        yield made, names
    finally:
        made.rmdir()


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_a_neighbour_process_that_takes_memory_in_a_control_group_costs_a_finer_cut_and_no_process(group):
    made, names = group
    run(GROUP, str(made), *names, NEIGHBOUR)
