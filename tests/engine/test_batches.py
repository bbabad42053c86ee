"""Which rows does a rank load, and which does a loader give twice?"""

import logging
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

import wholebatch as wb
from wholebatch.engine.ranks.repeats import repeated_rows, say_repeated_rows

LENGTHS = st.lists(st.integers(0, 300), min_size=1, max_size=70)


def epoch(lengths, ranks, **options):
    """Return the logical batches of an epoch, each as what every rank takes of it."""
    shares = [list(wb.LogicalBatches(lengths, rank=rank, ranks=ranks, **options)) for rank in range(ranks)]
    return list(zip(*shares, strict=True))


@given(lengths=LENGTHS, rows=st.integers(1, 40), ranks=st.integers(1, 5), balance=st.sampled_from(["tokens", "rows"]))
def test_every_row_comes_once_an_epoch_on_one_rank(lengths, rows, ranks, balance):
    batches = epoch(lengths, ranks, rows=rows, balance=balance)
    assert sorted(row for batch in batches for share in batch for row in share) == list(range(len(lengths)))
    sizes = [sum(map(len, batch)) for batch in batches]
    assert sizes[:-1] == [rows] * (len(sizes) - 1)
    assert 1 <= sizes[-1] <= rows


@given(lengths=LENGTHS, rows=st.integers(1, 40), ranks=st.integers(2, 5), balance=st.sampled_from(["tokens", "rows"]))
def test_logical_batches_are_the_same_whatever_the_number_of_ranks(lengths, rows, ranks, balance):
    one = epoch(lengths, 1, rows=rows, balance=balance)
    many = epoch(lengths, ranks, rows=rows, balance=balance)
    assert [set(share) for (share,) in one] == [{row for share in batch for row in share} for batch in many]


@given(rows=st.integers(1, 40), ranks=st.integers(1, 5))
def test_a_rank_is_without_rows_only_at_the_tail(rows, ranks):
    *batches, _ = epoch([5] * 37, ranks, rows=max(rows, ranks))
    assert all(share for batch in batches for share in batch)


def test_ranks_get_like_work():
    draw = random.Random(0)
    lengths = [draw.randint(1, 512) for _ in range(1000)]
    by_tokens, by_rows = (
        max(
            max(work) / (sum(work) / 4)
            for batch in epoch(lengths, 4, rows=64, balance=balance, attention=0)[:-1]
            for work in [[sum(lengths[row] for row in share) for share in batch]]
        )
        for balance in ("tokens", "rows")
    )
    assert by_tokens < 1.01
    assert by_rows > 1.1  # the bound sees rows that are shared out by number alone


def test_rows_are_shared_out_by_number_where_lengths_are_not_given():
    assert epoch(10, 3, rows=5, shuffle=False) == [([0, 3], [1, 4], [2]), ([5, 8], [6, 9], [7])]


def test_each_epoch_has_an_order_of_its_own_that_comes_back():
    batches = wb.LogicalBatches(100, rows=30, rank=0, ranks=2)
    first, again = list(batches), list(batches)
    batches.set_epoch(1)
    second = list(batches)
    batches.set_epoch(0)
    assert first == again == list(batches)
    assert second != first
    assert first != list(wb.LogicalBatches(100, rows=30, seed=1, rank=0, ranks=2))
    assert [len(wb.LogicalBatches(n, rows=30)) for n in (1, 30, 31, 100)] == [1, 1, 2, 4]


def test_one_process_is_a_group_of_one(monkeypatch):
    assert list(wb.LogicalBatches(5, rows=3, shuffle=False)) == [[0, 1, 2], [3, 4]]
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)  # a process of torchrun's that has not joined its group yet
    assert list(wb.LogicalBatches(5, rows=3, shuffle=False)) == [[1], [4]]


def test_it_is_a_batch_sampler_of_a_loader():
    data = [torch.full((length,), float(length)) for length in (9, 2, 3, 4, 8, 1)]
    batches = wb.LogicalBatches([len(row) for row in data], rows=4, shuffle=False, rank=1, ranks=2)
    loader = DataLoader(data, batch_sampler=batches, collate_fn=list)
    assert len(loader) == 2
    assert [[len(row) for row in batch] for batch in loader] == [[2, 3, 4], [1]]
    accumulator = wb.Accumulator(
        model := torch.nn.Linear(1, 1),
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model, rows: model(rows).mean(),
        collate=lambda rows: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).sum(dim=1, keepdim=True),
        micro_batch=wb.Rows(2),
    )
    assert [accumulator.step(batch).rows for batch in loader] == [3, 1]


def test_a_rank_without_rows_gets_none_instead_of_an_error_of_the_collate_function():
    data = [torch.ones(2) * row for row in range(5)]
    found = []
    for collate_fn in (None, wb.LogicalBatches.collate()):
        batches = wb.LogicalBatches(len(data), rows=4, shuffle=False, rank=1, ranks=2)
        loader = iter(DataLoader(data, batch_sampler=batches, collate_fn=collate_fn))
        found.append(next(loader))
        if collate_fn is None:
            with pytest.raises(IndexError):
                next(loader)  # what it is there for
        else:
            assert next(loader) is None
    assert torch.equal(*found)
    assert pickle.loads(pickle.dumps(wb.LogicalBatches.collate(sum)))([1, 2]) == 3  # for the workers of a loader


@pytest.mark.parametrize(
    "lengths", [torch.tensor([3, 3]), np.array([3, 3]), [torch.tensor(3), np.int64(3)], np.int64(2)]
)
def test_lengths_may_be_tensors_and_arrays(lengths):
    assert list(wb.LogicalBatches(lengths, rows=2, shuffle=False, rank=1, ranks=2)) == [[1]]


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((0,), {"rows": 4}, "hold no rows"),
        (([],), {"rows": 4}, "hold no rows"),
        ((10,), {"rows": 0}, "0 rows"),
        ((10,), {"rows": 4, "balance": "tokens"}, "how long each row is"),
        (([1, 2],), {"rows": 4, "balance": "bytes"}, "balance='bytes'"),
        (([1, -2],), {"rows": 4}, "A length is -2"),
        ((object(),), {"rows": 4}, "The lengths are a object"),
        ((10,), {"rows": 4, "rank": 1}, "rank=1 and ranks=None"),
        ((10,), {"rows": 4, "rank": 2, "ranks": 2}, "rank=2 and ranks=2"),
    ],
)
def test_nonsense_is_refused_with_a_hint(arguments, options, said):
    with pytest.raises(wb.WholeBatchError, match=said) as caught:
        wb.LogicalBatches(*arguments, **options)
    assert "hint:" in str(caught.value)


@given(num_rows=st.integers(1, 60), ranks=st.integers(1, 6), drop=st.booleans())
def test_rows_that_a_distributed_sampler_repeats_are_counted(num_rows, ranks, drop):
    data = list(range(num_rows))
    samplers = [DistributedSampler(data, ranks, rank, drop_last=drop) for rank in range(ranks)]
    times = Counter(row for sampler in samplers for row in sampler)
    expected = sum(count - 1 for count in times.values())
    assert repeated_rows(DataLoader(data, sampler=samplers[0], batch_size=4)) == expected


@given(num_rows=st.integers(24, 80), ranks=st.integers(1, 4), split=st.booleans(), drop=st.booleans())
def test_rows_that_accelerate_repeats_are_counted(num_rows, ranks, split, drop):
    data = list(range(num_rows))
    batches = BatchSampler(SequentialSampler(data), batch_size=12 if split else 4, drop_last=drop)
    shards = [BatchSamplerShard(batches, ranks, rank, split_batches=split) for rank in range(ranks)]
    times = Counter(row for shard in shards for batch in shard for row in batch)
    assert repeated_rows(DataLoader(data, batch_sampler=shards[0])) == sum(count - 1 for count in times.values())


def test_it_is_said_that_a_loader_repeats_rows_and_ours_says_nothing():
    data, said = list(range(10)), []

    def say(reason, level):
        said.append((reason, level))

    for ranks in (4, 11):
        say_repeated_rows(DataLoader(data, sampler=DistributedSampler(data, ranks, 0)), say)
    assert [level for _, level in said] == [logging.WARNING] * 2
    assert "2 rows come twice" in said[0][0]
    assert "1 row comes twice" in said[1][0]
    assert "hint: let wb.LogicalBatches share out the rows" in said[0][0]
    for loader in (DataLoader(data), DataLoader(data, batch_sampler=wb.LogicalBatches(10, rows=4)), iter(data)):
        say_repeated_rows(loader, say)
    assert len(said) == 2


def test_an_amount_that_is_no_number_of_rows_is_refused():
    with pytest.raises(wb.SplitError, match="rows='10 rows' is no whole number"):
        wb.LogicalBatches(25, "10 rows")
