"""A plan is applied: few blocks recompute, chosen by what they free for their time, and the update stays the same."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import wholebatch as wb
from wholebatch.engine import memory
from wholebatch.engine.fit import offloading
from wholebatch.engine.fit.blocks import Ledger
from wholebatch.engine.meetings.draws import Passage


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


def test_a_way_that_is_chosen_is_known_for_rows_of_any_length():
    """Ways are compared by the longest rows; the one that is taken knows what shorter ones take."""
    model = stack()
    texts = [torch.randn(length, 16, dtype=torch.float64) for length in (4, 9, 15, 20)]
    options = {"collate": partial(nn.utils.rnn.pad_sequence, batch_first=True), "length": len, "timed": False}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = wb.plan(model, optimizer, loss_fn, texts, 12, "1GiB", **options)
    plan = wb.plan(model, optimizer, loss_fn, texts, 12, plain.peak_at(1, 20) - 5000, **options)
    assert plan.fits
    assert plan.checkpointing
    assert plan.need.passes.lengths == plain.need.passes.lengths == (4, 15, 20)
    plan.apply(model)
    known = wb.plan(model, optimizer, loss_fn, texts, 12, "1GiB", **options)
    assert [plan.need.passes.peak(2, each) for each in (4, 11)] == [known.need.passes.peak(2, each) for each in (4, 11)]
    wb.uncheckpoint_blocks(model)
    said = wb.plan(model, optimizer, loss_fn, texts, 12, plain.peak_at(1), micro_batch=wb.Tokens(40, len), **options)
    assert "recompute" in " ".join(said.reasons)


def test_the_random_states_that_recomputing_blocks_keep_are_planned():
    """Each block keeps one until its backward pass; with small rows they are a good part of all."""
    model = stack(torch.float32)
    wb.checkpoint_blocks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = wb.plan(model, optimizer, loss_fn, torch.randn(4, 2, 16), 64, "1GiB", timed=False)
    assert "agree with it to the byte" in plan.reasons[-1]


def trained(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"micro_batch": wb.Rows(3), "check": None} | options
    accumulator = wb.Accumulator(model, optimizer, loss_fn, **options)
    torch.manual_seed(3)
    for _ in range(2):
        assert accumulator.step(rows(dtype=next(model.parameters()).dtype)).applied
    return model.state_dict(), torch.get_rng_state()


def applied(model, names):
    """Apply a plan that has chosen these blocks."""
    plan = planned(copy.deepcopy(model))
    return replace(plan, checkpointing=names).apply(model)


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
    assert applied(model, names).blocks == names
    found, found_stream = trained(model, **options)
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    assert torch.equal(stream, found_stream)


@pytest.mark.parametrize("lockstep", ["replay", "joined"])
def test_the_comparison_sees_draws_of_another_micro_batch(lockstep, monkeypatch):
    """Beside the test above: a stream that is put back to the beginning of a block only is seen."""
    monkeypatch.setattr(Passage, "resume", lambda *_: None)
    plain, _ = trained(stack(inner=(128,), meets=True), lockstep=lockstep)
    model = stack(inner=(128,), meets=True)
    applied(model, ("blocks.0",))
    found, _ = trained(model, lockstep=lockstep)
    assert not all(torch.allclose(plain[name], found[name]) for name in plain)


def test_micro_batches_that_cannot_be_told_apart_are_an_error():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x):
            return self.layer(nn.functional.dropout(x / wb.sum_over_batch(len(x))))

    torch.manual_seed(0)
    model = nn.Sequential(Counting(), Counting()).double()
    wb.checkpoint_blocks(model, ["0"])
    with pytest.raises(wb.MeetingError, match="2 micro-batches came there alike"):
        trained(model, micro_batch=wb.Rows(6), lockstep="joined")


def test_a_ledger_counts_what_a_block_keeps_beside_what_goes_in_and_out():
    model = stack(torch.float32, inner=(128, 32))
    model.blocks[0].layers[3].p = 0.0  # dropout that drops nothing keeps nothing
    ledger = Ledger(model, ["blocks.0", "blocks.1"], torch.device("cpu"))
    with ledger.watching():
        loss_fn(model, rows(6, torch.float32))
    first, second = ledger.blocks(6)
    # The normed input, its mean and deviation, what the function returns; and with dropout the mask and its result.
    assert first.kept_bytes == 20 * 4 * (16 + 2 + 128)
    assert second.kept_bytes == 20 * 4 * (16 + 2 + 3 * 32)
    assert first.seconds > 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_those_blocks_recompute_that_free_most_for_their_time_and_no_more_than_will_do():
    model = stack(torch.float32, inner=(16, 512, 16, 512, 16, 512, 16))
    assert planned(model).checkpointing == ()
    few, more = planned(model, fewer=1000), planned(model, fewer=180_000)
    assert few.checkpointing == ("blocks.1",)
    assert more.checkpointing == ("blocks.1", "blocks.3")
    assert "A single row does not fit as it is" in few.reasons[0]
    assert "blocks.1 recomputes its activations" in few.reasons[0]
    assert "for a millisecond of computing it anew" in few.reasons[1]
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("fewer", [1000, 80_000])
def test_a_plan_that_recomputes_keeps_to_its_budget(fewer):
    model = stack(torch.float32, inner=(256,) * 4)
    plan = planned(model, fewer=fewer)
    assert plan.fits
    assert 0 < len(plan.checkpointing) < 4
    plan.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"micro_batch": plan.micro_batch, "memory": plan.budget_bytes, "check": None}
    accumulator = wb.Accumulator(model, optimizer, loss_fn, **options)
    batch = rows(dtype=torch.float32)
    accumulator.step(batch)
    before = sum(each.numel() * 4 for each in model.parameters())
    with memory.tensor_peak() as peak:
        accumulator.step(batch)
    assert before + peak.peak_bytes <= plan.budget_bytes
    assert before + peak.peak_bytes == pytest.approx(plan.peak_bytes, rel=0.01, abs=5056)


def test_what_was_applied_can_be_taken_back():
    model = stack(torch.float32)
    wb.checkpoint_blocks(model, ["blocks.3"])
    handle = applied(model, ("blocks.0", "blocks.3"))
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == ["blocks.0", "blocks.3"]
    assert "blocks.0" in repr(handle)
    handle.undo()
    handle.undo()
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == ["blocks.3"]
    with applied(model, ("blocks.1",)):
        assert "forward" in vars(model.blocks[1])
    assert "forward" not in vars(model.blocks[1])


def test_a_forward_method_of_somebody_else_is_kept():
    model = stack(torch.float32)
    calls = []
    own = model.blocks[0].forward

    def noting(x):
        calls.append(1)
        return own(x)

    model.blocks[0].forward = noting
    with applied(model, ("blocks.0",)):
        calls.clear()
        loss_fn(model, rows(2, torch.float32)).backward()
        assert len(calls) == 2
    assert model.blocks[0].forward is noting


def test_a_plan_that_cannot_be_applied_says_so():
    model = stack(torch.float32)
    with pytest.raises(wb.OutOfMemoryError, match="does not fit") as error:
        planned(model, 60_000).apply(model)
    assert "alternatives" in error.value.hint
    plan = planned(model)
    with pytest.raises(wb.ConfigError, match="to a str"):
        plan.apply("model")
    with pytest.raises(wb.ConfigError, match="from figures alone"):
        replace(plan, hand=None).apply(model)
    with pytest.raises(wb.ConfigError, match="no submodule"):
        replace(plan, checkpointing=("zzz",)).apply(model)


def test_blocks_that_cannot_be_watched_are_taken_from_the_front(monkeypatch):
    def broken(*_):
        raise RuntimeError("no")

    model = stack(torch.float32)
    monkeypatch.setattr("wholebatch.engine.fit.probe.Probe.watch", broken)
    chosen = planned(model, fewer=1000).checkpointing
    assert 0 < len(chosen) < 4
    assert chosen == tuple(f"blocks.{place}" for place in range(len(chosen)))


def test_a_micro_batch_that_is_too_much_is_told_what_would_help():
    model = stack(torch.float32, inner=(512,) * 4)
    plan = planned(model, micro_batch=wb.Rows(12))
    plan = planned(model, plan.peak_bytes - 100_000, micro_batch=wb.Rows(12))
    assert not plan.fits
    assert any("would fit" in reason and "recomputes its activations" in reason for reason in plan.reasons)


def test_activations_wait_on_the_host_and_no_number_changes(monkeypatch):
    """On a CPU the host is where they are; that they are handed over can be seen there all the same."""
    packed = []
    hook = torch.autograd.graph.save_on_cpu

    class Noting(hook):
        def __init__(self, **options):
            super().__init__(**options)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: packed.append(tensor) or pack(tensor)

    monkeypatch.setattr(offloading, "save_on_cpu", Noting)
    plain, _ = trained(stack())
    model = stack()
    plan = replace(planned(copy.deepcopy(model)), offload=True)
    with plan.apply(model) as handle:
        assert handle.offload
        found, _ = trained(model)
        assert packed
        weights = {each.data_ptr() for each in model.parameters()}
        assert not weights.intersection(each.data_ptr() for each in packed)
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    packed.clear()
    loss_fn(model, rows()).backward()
    assert not packed
    assert "forward" not in vars(model)


def test_the_host_is_not_asked_where_the_device_is_the_host(monkeypatch):
    model = stack(torch.float32)
    assert not planned(model, 60_000).offload
    monkeypatch.setattr("wholebatch.engine.fit.ways.HOSTED", {"cpu"})
    asked = []
    monkeypatch.setattr("wholebatch.engine.fit.ways.offloading", lambda each: asked.append(each) or nullcontext())
    assert not planned(model, 60_000).fits  # it would help on a device only
    assert asked


@pytest.mark.accelerator
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_plan_offloads_where_nothing_else_helps():
    model = stack(torch.float32, inner=(4096,) * 4).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sample = rows(4, torch.float32).repeat(1, 50, 1).cuda()
    whole = wb.plan(model, optimizer, loss_fn, sample, 12, "8GiB", timed=False)
    all_blocks = next(each for each in whole.alternatives if each.name == "checkpointing")
    budget = min(whole.peak_at(1), all_blocks.peak_bytes // max(1, all_blocks.largest_rows)) // 2
    plan = wb.plan(model, optimizer, loss_fn, sample, 12, max(budget, whole.need.floor_bytes), timed=False)
    if plan.fits and plan.offload:
        plan.apply(model)
        torch.cuda.reset_peak_memory_stats()
        wb.Accumulator(model, optimizer, loss_fn, micro_batch=plan.micro_batch, check=None).step(sample)
        assert torch.cuda.max_memory_allocated() <= 1.1 * plan.budget_bytes
