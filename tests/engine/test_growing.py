"""Logical batches that grow in training: every row once, exact, the same again after a stop."""

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import wholebatch as wb
from menagerie import CALM, mean_square
from properties import flat, parts, relative_error, sgd
from wholebatch.core.batch import LogicalBatch
from wholebatch.evidence import reference

MLP = CALM["mlp"]
ALL = 61


def sizes_of(schedule, epochs, rows=ALL, **options):
    sampler = wb.LogicalBatches(rows, schedule, **options)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        assert len(sampler) == len(list(sampler))
        batches = list(sampler)
        assert sorted(row for batch in batches for row in batch) == list(range(rows))
        yield [len(batch) for batch in batches]


def test_a_sampler_follows_a_schedule_over_epochs():
    schedule = wb.schedules.Stepped(10, {3: 20, 8: 40})
    assert list(sizes_of(schedule, 3)) == [[10, 10, 10, 20, 11], [20, 20, 20, 1], [40, 21]]


def test_a_sampler_follows_epochs():
    schedule = wb.schedules.Geometric(10, 40, over=2, by="epoch")
    assert list(sizes_of(schedule, 3)) == [[10] * 6 + [1], [20, 20, 20, 1], [40, 21]]


def test_a_fixed_schedule_is_a_number():
    one, other = wb.LogicalBatches(ALL, 8), wb.LogicalBatches(ALL, wb.schedules.Fixed(8))
    one.set_epoch(3)
    other.set_epoch(3)
    assert list(one) == list(other)
    assert len(one) == len(other) == 8


def test_any_epoch_can_be_the_first_that_is_read():
    """So a run that goes on draws what it would have drawn."""
    schedule = wb.schedules.Linear(4, 30, over=12)
    whole = list(sizes_of(schedule, 3))
    sampler = wb.LogicalBatches(ALL, schedule)
    sampler.set_epoch(2)
    assert [len(batch) for batch in sampler] == whole[2]


def test_ranks_share_out_each_size():
    schedule = wb.schedules.Stepped(6, {2: 12})
    shares = [list(wb.LogicalBatches(ALL, schedule, rank=rank, ranks=3)) for rank in range(3)]
    sizes = [sum(map(len, batch)) for batch in zip(*shares, strict=True)]
    assert sizes == [6, 6, 12, 12, 12, 12, 1]


@pytest.mark.parametrize("rows", [None, "8", 0, -2])
def test_what_is_no_size_gets_a_hint(rows):
    with pytest.raises(wb.SplitError, match="hint: "):
        wb.LogicalBatches(ALL, rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_growth_by_noise_through_a_loader_that_reads_ahead(workers):
    """Every row once an epoch, and the sizes are those that the schedule has written down."""
    schedule = wb.schedules.ByNoise(2, largest=16, every=2, smoothing=0.0)
    sampler = wb.LogicalBatches(ALL, schedule)
    loader = DataLoader(range(ALL), batch_sampler=sampler, collate_fn=list, num_workers=workers)
    made = 0
    for epoch in range(2):
        sampler.set_epoch(epoch)
        seen, sizes, first = [], [], made
        for rows in loader:
            seen += rows
            sizes.append(len(rows))
            made += 1
            schedule.note(
                wb.Update(
                    number=made, loss=1.0, targets=len(rows), rows=len(rows), micro_batches=2, lr=0.1, noise_scale=1e6
                )
            )
        assert sorted(seen) == list(range(ALL))
        assert sizes[:-1] == [schedule.at(first + place) for place in range(len(sizes) - 1)]
    assert sizes[0] == 16


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("by_noise", [False, True], ids=["stepped", "by noise"])
def test_a_loader_that_is_stopped_in_the_middle_of_an_epoch_goes_on(by_noise):
    """torchdata walks over what was yielded before, so that the sampler has to draw the same sizes again."""

    def make():
        schedule = wb.schedules.ByNoise(2, largest=16, every=2, smoothing=0.0) if by_noise else None
        schedule = schedule or wb.schedules.Stepped(2, {13: 5, 20: 9})
        sampler = wb.LogicalBatches(ALL, schedule)
        return schedule, sampler, StatefulDataLoader(range(ALL), batch_sampler=sampler, collate_fn=list)

    def drawn(schedule, loader, epoch, made=0, stop=None):
        seen = []
        for rows in loader:
            seen.append(rows)
            made += 1
            known = {"loss": 1.0, "targets": len(rows), "rows": len(rows), "micro_batches": 2, "lr": 0.1}
            schedule.note(wb.Update(number=made, noise_scale=40.0, **known))
            if len(seen) == stop:
                break
        return seen

    schedule, sampler, loader = make()
    first = drawn(schedule, loader, 0)
    sampler.set_epoch(1)
    second = drawn(schedule, loader, 1, len(first))
    schedule, sampler, loader = make()
    drawn(schedule, loader, 0)
    sampler.set_epoch(1)
    before = drawn(schedule, loader, 1, len(first), stop=2)
    state, position = schedule.state_dict(), loader.state_dict()
    schedule, sampler, loader = make()
    schedule.load_state_dict(state)
    sampler.set_epoch(1)
    loader.load_state_dict(position)
    assert before + drawn(schedule, loader, 1, len(first) + 2) == second
    assert len({len(rows) for rows in first + second}) > 2


def grown(schedule, stop=None, tmp_path=None):
    """Train on rows in order with `updates`; stop after so many updates and go on in another accumulator."""
    batch = MLP.batch(ALL, torch.float64)
    pieces = [part for part, _ in parts(MLP, batch, (1,) * ALL)]
    model = MLP.model()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), mean_square, check=None)
    records = []
    for update in accumulator.updates(pieces, micro_batches=schedule):
        records.append(update)
        if len(records) == stop:
            break
    if stop is not None:
        wb.save(tmp_path / "state", accumulator)
        model = MLP.model()
        accumulator = wb.Accumulator(model, sgd(model.parameters()), mean_square, check=None)
        wb.load(tmp_path / "state", accumulator)
        left = pieces[sum(update.micro_batches for update in records) :]
        records += accumulator.updates(left, micro_batches=schedule)
    return model, records


def test_windows_of_a_loader_grow_and_each_is_exact():
    model, records = grown(wb.schedules.Stepped(4, {2: 10, 4: 25}))
    sizes = [update.micro_batches for update in records]
    assert sizes == [4, 4, 10, 10, 25, 8]
    judge, start = MLP.model(), 0
    judge_optimizer, batch = sgd(judge.parameters()), MLP.batch(ALL, torch.float64)
    for size in sizes:
        rows = LogicalBatch(batch).take(range(start, start + size))
        reference.update(judge, judge_optimizer, mean_square, rows, targets=lambda _, size=size: size, reduction="mean")
        start += size
    before = flat(MLP.model().parameters())
    assert relative_error(flat(model.parameters()) - before, flat(judge.parameters()) - before) < 1e-12


def test_a_run_that_goes_on_is_as_far_in_its_schedule(tmp_path):
    schedule = wb.schedules.Stepped(4, {2: 10, 4: 25})
    whole, records = grown(schedule)
    again, more = grown(schedule, 3, tmp_path)
    assert [update.micro_batches for update in more] == [update.micro_batches for update in records]
    assert torch.equal(flat(again.parameters()), flat(whole.parameters()))


def test_a_loader_tells_a_schedule_by_noise():
    direction = torch.full((16,), 0.25, dtype=torch.float64)
    model = torch.nn.Linear(16, 1, bias=False, dtype=torch.float64)
    accumulator = wb.Accumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        lambda model, batch: model(batch).mean(),
        noise_scale=True,
    )
    schedule = wb.schedules.ByNoise(2, largest=64, every=20)
    generator = torch.Generator().manual_seed(0)
    loader = (
        direction + 3 * torch.randn(4, 16, generator=generator, dtype=torch.float64) for _ in range(4000)
    )  # 144 rows, which are 36 micro-batches
    sizes = [update.micro_batches for update in accumulator.updates(loader, micro_batches=schedule)]
    assert max(sizes) == 32
    assert accumulator.noise.scale == pytest.approx(144, rel=0.2)
    assert schedule.wanted == pytest.approx(36, rel=0.3)


@pytest.mark.parametrize("micro_batches", [0, 2.5, "8", None])
def test_what_makes_no_window_gets_a_hint(micro_batches):
    model = MLP.model()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), mean_square)
    with pytest.raises(wb.WindowError, match="hint: "):
        next(accumulator.updates([], micro_batches=micro_batches))
