"""Activations that wait in a file: the same bits, in less memory."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import wholebatch as wb
from menagerie import numbers
from properties import assert_leaves_no_trace, flat
from wholebatch.engine.fit.timeline import Timeline
from wholebatch.engine.meetings import spilling


def build(layers: int = 6) -> nn.Module:
    torch.manual_seed(0)
    body = [each for _ in range(layers) for each in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh())]
    return wb.exact_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 1), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def batch_of(rows: int = 16) -> dict[str, Tensor]:
    return {"x": numbers(rows, 3, 24, 24, dtype=torch.float32), "y": torch.arange(rows) % 8}


def accumulator_of(model: nn.Module) -> wb.Accumulator:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return wb.Accumulator(model, optimizer, loss_fn, micro_batch=wb.Rows(4), check=None)


def trained(*, offloaded: bool, updates: int = 3, channels_last: bool = False) -> tuple[Tensor, int]:
    """The weights after some updates, and what tensors took at most in the last of them."""
    model, batch = build(), batch_of()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        batch["x"] = batch["x"].contiguous(memory_format=torch.channels_last)
    accumulator = accumulator_of(model)

    def run() -> int:
        for _ in range(updates):
            with Timeline(torch.device("cpu")) as timeline:
                accumulator.step(batch)
        return timeline.peak_bytes

    if offloaded:
        with wb.offload_to_file():
            peak = run()
    else:
        peak = run()
    return flat(model.parameters()), peak


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_same_bits_in_less_memory(channels_last):
    right, whole = trained(offloaded=False, channels_last=channels_last)
    found, peak = trained(offloaded=True, channels_last=channels_last)
    assert torch.equal(found, right)
    assert peak < 0.4 * whole


def test_the_room_is_used_again(monkeypatch):
    """The file of many windows is as large as that of one; what is saved twice is written once."""
    ends = []

    class Watched(spilling._Kept):
        def _write(self, tensor: Tensor) -> Any:
            place = super()._write(tensor)
            ends.append((self._end, tensor.numel() * tensor.element_size()))
            return place

    monkeypatch.setattr(spilling, "_Kept", Watched)
    trained(offloaded=True, updates=1)
    once, written = max(end for end, _ in ends), len(ends)
    ends.clear()
    trained(offloaded=True, updates=4)
    assert max(end for end, _ in ends) == once
    assert len(ends) == 4 * written
    inputs_and_outputs = 4 * (1 + 3 * 6)
    assert written <= inputs_and_outputs


def test_weights_small_and_narrow_tensors():
    """Weights stay, also as views; small tensors stay; 16 bits, booleans and whole numbers come back as they were."""
    weight = nn.Parameter(torch.randn(200, 200))
    with wb.offload_to_file():
        x = torch.randn(300, 200).bfloat16()
        kept = (torch.randn(300, 200) > 0).repeat(2, 1)
        places = torch.randint(200, (300, 200))
        y = (x.float() @ weight.T).gather(1, places)
        z = torch.where(kept[:300], y, 0.0).square().sum() + (weight[0] * weight[1]).sum()
        z.backward()
    found, weight.grad = weight.grad, None
    y = (x.float() @ weight.T).gather(1, places)
    (torch.where(kept[:300], y, 0.0).square().sum() + (weight[0] * weight[1]).sum()).backward()
    assert torch.equal(found, weight.grad)
    for tensor, goes in (
        (weight, False),
        (weight.T, False),
        (x, True),
        (x[:1], False),
        (x.to_sparse(), False),
        (weight * 1, True),
    ):
        assert spilling._goes(tensor) == goes


def test_a_full_disk_leaves_no_trace(monkeypatch):
    model = build()
    accumulator, batch = accumulator_of(model), batch_of()
    accumulator.step(batch)
    monkeypatch.setattr(spilling._Kept, "_write", _full)
    with assert_leaves_no_trace(model), pytest.raises(OSError, match="No space left"), wb.offload_to_file():
        accumulator.step(batch)
    monkeypatch.undo()
    assert accumulator.step(batch).applied


def _full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), wb.offload_to_file(Path(tmp_path) / "nowhere"):
        pass
