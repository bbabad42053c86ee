"""A plan is applied: few blocks recompute, chosen by what they free for their time, and the update stays the same."""

import pytest
import torch
from torch import nn

import wholebatch as wb


class Block(nn.Module):
    """Dropout inside, and a mean over the whole logical batch if it is asked for."""

    def __init__(self, width=16, inner=128, *, meets=False):
        super().__init__()
        self.meets = meets
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, inner), nn.Tanh(), nn.Dropout(0.2), nn.Linear(inner, width)
        )

    def forward(self, x):
        if self.meets:
            x = x - wb.gather(x.mean(dim=1)).mean(dim=0)
        return x + self.layers(x)


class Stack(nn.Module):
    def __init__(self, inner=(128,) * 4, *, meets=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(inner=each, meets=meets) for each in inner)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def stack(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return Stack(**options).to(dtype)


def rows(count=12, dtype=torch.float64):
    return torch.randn(count, 20, 16, dtype=dtype, generator=torch.Generator().manual_seed(1))


def loss_fn(model, x):
    return model(x).square().mean()


def planned(model, budget=None, *, fewer=0, timed=False, **options):
    """A plan for which a single row does not fit as it is, by so many bytes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sample = rows(4, next(model.parameters()).dtype)
    plan = wb.plan(model, optimizer, loss_fn, sample, 12, budget or "1GiB", timed=timed, **options)
    if not fewer:
        return plan
    return wb.plan(model, optimizer, loss_fn, sample, 12, plan.peak_at(1) - fewer, timed=timed, **options)


def trained(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"micro_batch": wb.Rows(3), "check": None} | options
    accumulator = wb.Accumulator(model, optimizer, loss_fn, **options)
    torch.manual_seed(3)
    for _ in range(2):
        assert accumulator.step(rows(dtype=next(model.parameters()).dtype)).applied
    return model.state_dict(), torch.get_rng_state()


@pytest.mark.parametrize(
    ("options", "dtype", "meets"),
    [
        ({}, torch.float64, False),
        ({"micro_batch": wb.Rows(12)}, torch.float64, False),
        ({"precision": "bf16"}, torch.float32, False),
        ({"lockstep": "replay"}, torch.float64, True),
        ({"lockstep": "joined"}, torch.float64, True),
    ],
    ids=["cut", "whole", "autocast", "meetings replayed", "meetings joined"],
)
def test_the_update_is_the_same_bit_for_bit(options, dtype, meets):
    """Dropout draws the same masks again; weights and the random stream end as without the plan."""
    # A meeting that feeds another needs joined graphs.
    inner = (128,) if options.get("lockstep") == "replay" else (128,) * 4
    plain, stream = trained(stack(dtype, inner=inner, meets=meets), **options)
    model = stack(dtype, inner=inner, meets=meets)
    names = tuple(f"blocks.{place}" for place in range(len(inner)))[:2]
    plan = wb.plan(model, torch.optim.SGD(model.parameters()), loss_fn, rows(4, dtype), 12, "1GiB", timed=False)
    applied = plan.hand(replaced(plan, names), model)
    assert applied.blocks == names
    found, found_stream = trained(model, **options)
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    assert torch.equal(stream, found_stream)


def replaced(plan, names):
    from dataclasses import replace

    return replace(plan, checkpointing=names)
