"""Blocks that recompute: the same update, less memory."""

import copy
import pickle

import pytest
import torch
from torch import nn

import wholebatch as wb
from wholebatch.engine import memory
from wholebatch.engine.fit.checkpointing import find_blocks


class Block(nn.Module):
    """Dropout, and a running mean that every forward pass moves."""

    def __init__(self, width=16, *, norm=False):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 8 * width), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8 * width, width)
        )
        self.norm = nn.BatchNorm1d(width) if norm else nn.LayerNorm(width)

    def forward(self, x, *, scale=1.0):
        return x + scale * self.layers(self.norm(x))


class Stack(nn.Module):
    def __init__(self, *, norm=False, blocks=4):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block(norm=norm) for _ in range(blocks))
        self.last = nn.Linear(16, 1)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.last(x)


def stack(**options):
    torch.manual_seed(0)
    return Stack(**options).double()


def loss_fn(model, x):
    return model(x).square().mean()


def rows(count=12):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def trained(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    accumulator = wb.Accumulator(model, optimizer, loss_fn, micro_batch=wb.Rows(4), check=None, **options)
    torch.manual_seed(3)
    for _ in range(2):
        accumulator.step(rows())
    return model.state_dict(), torch.get_rng_state()


@pytest.mark.parametrize("norm", [False, True], ids=["layer norm", "batch norm"])
def test_the_update_is_the_same_bit_for_bit(norm):
    """With dropout, whose masks must be drawn again, and batch norm, whose buffers must move once."""
    options = {"batch_norm": "per_micro_batch"} if norm else {}
    plain, plain_random = trained(stack(norm=norm), **options)
    model = stack(norm=norm)
    assert wb.checkpoint_blocks(model) == tuple(f"blocks.{place}" for place in range(4))
    state, random = trained(model, **options)
    assert plain.keys() == state.keys()
    assert all(torch.equal(plain[name], state[name]) for name in plain)
    assert torch.equal(plain_random, random)


def test_the_comparison_sees_buffers_that_move_twice(monkeypatch):
    """Beside the test above: a second forward pass that keeps its buffers is seen."""
    monkeypatch.setattr("wholebatch.engine.fit.checkpointing._fill", lambda *_: None)
    plain, _ = trained(stack(norm=True), batch_norm="per_micro_batch")
    model = stack(norm=True)
    wb.checkpoint_blocks(model)
    state, _ = trained(model, batch_norm="per_micro_batch")
    assert not all(torch.equal(plain[name], state[name]) for name in plain)


def test_verify_agrees_under_autocast_too():
    model = stack().float()
    wb.checkpoint_blocks(model)
    assert wb.verify(model.eval(), loss_fn, rows().float(), micro_batch=wb.Rows(4)).ok
    model.train()
    state, _ = trained_in_bf16(model)
    plain, _ = trained_in_bf16(stack().float())
    assert all(torch.equal(plain[name], state[name]) for name in plain)


def trained_in_bf16(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"micro_batch": wb.Rows(4), "check": None, "precision": "bf16"}
    torch.manual_seed(3)
    update = wb.Accumulator(model, optimizer, loss_fn, **options).step(rows().float())
    return model.state_dict(), update


def test_it_saves_memory():
    peaks = []
    for blocks in ([], None):
        model = stack()
        wb.checkpoint_blocks(model, blocks)
        with memory.tensor_peak() as peak:
            loss_fn(model, rows(256)).backward()
        peaks.append(peak.peak_bytes)
    assert peaks[1] < 0.6 * peaks[0]


def test_a_model_that_recomputes_can_be_copied_saved_and_taken_back():
    model = stack().eval()
    names = list(model.state_dict())
    right = model(rows())
    wb.checkpoint_blocks(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(other.state_dict()) == names
        assert torch.equal(other(rows()), right)
        other.blocks[0].layers[0].weight.data.zero_()  # its blocks are its own
        assert torch.equal(model(rows()), right)
    assert find_blocks(model) == []
    wb.checkpoint_blocks(model, ["blocks.0"])
    wb.uncheckpoint_blocks(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert len(find_blocks(model)) == 4


def test_blocks_are_repeated_siblings_that_learn():
    def block():
        return nn.Sequential(nn.Linear(2, 2), nn.Tanh())

    frozen = nn.ModuleList(block() for _ in range(2)).requires_grad_(False)
    model = nn.ModuleDict(
        {
            "frozen": frozen,
            "single": block(),
            "layers": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
            "deep": nn.Sequential(Stack(blocks=2), nn.Tanh()),
            "lists": nn.ModuleList(nn.ModuleList(block() for _ in range(2)) for _ in range(2)),
        }
    )
    assert find_blocks(model) == ["deep.0.blocks.0", "deep.0.blocks.1", *(f"lists.{a}.{b}" for a in "01" for b in "01")]


def test_a_name_that_does_not_exist_is_refused_before_anything_changes():
    model = stack()
    with pytest.raises(wb.ConfigError, match=r"no submodule 'block\.0'") as error:
        wb.checkpoint_blocks(model, ["blocks.1", "block.0"])
    assert "blocks.0" in error.value.hint
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(wb.ConfigError, match="no repeated blocks"):
        wb.checkpoint_blocks(nn.Linear(2, 2))
    with pytest.raises(wb.ConfigError, match="no submodule") as error:
        wb.checkpoint_blocks(nn.Linear(2, 2), ["zzz"])
    assert "named_modules" in error.value.hint
