"""What did that cost? Peaks, and that they do not grow with the number of micro-batches."""

import platform
from pathlib import Path

import pytest
import torch
from torch import nn

import wholebatch as wb
from menagerie import numbers
from wholebatch.engine import memory
from wholebatch.engine.memory import tensor_peak

CPU = torch.device("cpu")
ROWS, WIDTH = 8, 1 << 14


def test_the_peak_of_tensors_is_what_was_live_at_once():
    with tensor_peak() as peak:
        kept = torch.zeros(1000, dtype=torch.float64)
        for _ in range(3):
            torch.zeros(4000, dtype=torch.float64)
    assert (peak.peak_bytes, peak.left_bytes) == (40_000, 8_000)
    del kept


@pytest.mark.skipif(platform.system() != "Linux", reason="the kernel's high-water mark")
def test_the_peak_of_the_process_rises_and_can_be_reset():
    memory.release(CPU)  # else what another test has freed may hold it
    memory.reset_peak(CPU)
    before = memory.peak_bytes(CPU)
    large = torch.ones(64 << 20, dtype=torch.uint8)
    assert memory.peak_bytes(CPU) - before >= 48 << 20
    del large
    memory.release(CPU)
    memory.reset_peak(CPU)
    assert memory.peak_bytes(CPU) - before < 48 << 20


def test_a_kernel_that_does_not_tell_has_no_peak(monkeypatch):
    def forbidden(*_):
        raise PermissionError

    memory._process.cache_clear()
    monkeypatch.setattr(memory.os, "open", forbidden)
    try:
        memory.reset_peak(CPU)
        assert memory.peak_bytes(CPU) is None
    finally:
        memory._process.cache_clear()


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep less")
def test_memory_that_nobody_uses_any_more_can_be_given_back():
    pieces = [torch.ones(25_000) for _ in range(1000)]
    del pieces[:-1]  # the last one keeps what lies below it from going back by itself
    kept = resident_bytes()
    memory.release(CPU)
    assert kept - resident_bytes() > 50 << 20
    memory.release(torch.device("meta"))


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_an_accelerator_tells_its_own_peak(kind, monkeypatch):
    reset = []
    module = getattr(torch, kind)
    monkeypatch.setattr(module, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(module, "max_memory_allocated", lambda _: 123)
    memory.reset_peak(torch.device(kind))
    assert reset == [torch.device(kind)]
    assert memory.peak_bytes(torch.device(kind)) == 123


def test_a_device_that_tells_nothing_has_no_peak():
    memory.reset_peak(torch.device("meta"))
    assert memory.peak_bytes(torch.device("meta")) is None


def wide_model():
    """Few weights, and activations of half a MiB for each of two layers."""
    return nn.Sequential(nn.Linear(1, WIDTH), nn.Tanh())


def peak_of(micro_batches, way, loss_fn):
    """The peak above weights, gradients and the logical batch's own data."""
    torch.manual_seed(0)
    model = wide_model()
    accumulator = wb.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=1e-3), loss_fn, micro_batch=wb.Rows(ROWS), check=None
    )
    accumulator.step(torch.ones(2 * ROWS, 1))
    whole = torch.ones(micro_batches * ROWS, 1) if way == "step" else None
    with tensor_peak() as peak:
        if way == "step":
            update = accumulator.step(whole)
        elif way == "updates":
            (update,) = accumulator.updates(
                (torch.ones(ROWS, 1) for _ in range(micro_batches)), micro_batches=micro_batches
            )
        else:
            with accumulator.window() as window:
                for _ in range(micro_batches):
                    window.backward(loss_fn(model, torch.ones(ROWS, 1)), targets=torch.tensor(ROWS))
            update = window.update
    assert update.micro_batches == micro_batches
    return peak.peak_bytes


def mean_of(model, x):
    return model(x).mean()


@pytest.mark.parametrize("way", ["step", "updates", "window"])
def test_the_peak_does_not_grow_from_8_to_1024_micro_batches(way):
    few, many = (peak_of(micro_batches, way, mean_of) for micro_batches in (8, 1024))
    assert few > 2 * ROWS * WIDTH * 4
    assert many <= 1.01 * few


def test_the_bound_sees_losses_that_are_kept_with_their_graphs():
    kept = []

    def keeping(model, x):
        kept.append(model(x).mean())  # for a log, with everything that its backward pass would need
        return model(x).mean()

    few, more = peak_of(4, "step", keeping), peak_of(16, "step", keeping)
    assert more > 1.01 * few


def test_the_peak_sees_the_undivided_batch():
    accumulated = peak_of(8, "step", mean_of)
    model = wide_model()
    with tensor_peak() as undivided:
        model(numbers(8 * ROWS, 1, dtype=torch.float32)).mean().backward()
    assert undivided.peak_bytes > 4 * accumulated


def test_memory_is_counted_alike_by_the_profiler_s_public_face(monkeypatch):
    """Another version of PyTorch may not have the short way to it."""

    def run(between, numbers=1000):
        x = torch.zeros(numbers)
        between()
        return (x + 1) @ torch.ones(numbers)

    runs = [run, lambda between: run(between, 2000), lambda _: torch.zeros(10)]
    short = memory.trace_peaks(torch.device("cpu"), runs)
    monkeypatch.delattr("torch._C._autograd._enable_profiler")
    assert memory.trace_peaks(torch.device("cpu"), runs) == short
    assert [each.changes[0] for each in short] == [4000, 8000, 40]
    assert [each.second for each in short] == [1, 1, 2]
    assert all(sum(each.changes) == 0 for each in short)
