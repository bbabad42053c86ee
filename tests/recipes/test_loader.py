"""Logical batches: every row once an epoch, in an order of their own."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wholebatch.core.errors import SplitError
from wholebatch.recipes.amount import Amount
from wholebatch.recipes.loader import LogicalBatches

lengths_of_rows = st.lists(st.integers(0, 30), min_size=1, max_size=40)


def of_tokens(lengths, count, seed=0):
    rows = list(enumerate(lengths))
    return LogicalBatches(rows, Amount(count, "tokens"), length=lambda row: row[1], seed=seed)


@given(num_rows=st.integers(1, 50), count=st.integers(1, 60), epoch=st.integers(1, 5))
def test_every_row_comes_once_an_epoch(num_rows, count, epoch):
    batches = LogicalBatches(range(num_rows), Amount(count, "rows"))
    epoch_of_batches = list(batches.epoch(epoch))
    assert sorted(row for batch in epoch_of_batches for row in batch) == list(range(num_rows))
    assert [len(batch) for batch in epoch_of_batches[:-1]] == [count] * (len(epoch_of_batches) - 1)
    assert batches.count(epoch) == len(epoch_of_batches) == -(-num_rows // count)


@given(lengths=lengths_of_rows, count=st.integers(1, 100))
def test_rows_are_taken_until_one_more_would_pass_the_tokens(lengths, count):
    batches = list(of_tokens(lengths, count).epoch(1))
    assert sorted(row for batch in batches for row in batch) == list(enumerate(lengths))
    sums = [sum(length for _, length in batch) for batch in batches]
    assert all(tokens <= count or len(batch) == 1 for tokens, batch in zip(sums, batches, strict=True))
    for tokens, following in zip(sums, batches[1:], strict=False):
        assert tokens + following[0][1] > count


def test_the_order_is_that_of_seed_and_epoch_and_of_nothing_else():
    first = list(LogicalBatches(range(50), Amount(8, "rows"), seed=3).epoch(2))
    random.seed(1)
    torch.rand(5)
    batches = LogicalBatches(range(50), Amount(8, "rows"), seed=3)
    list(batches.epoch(1))
    assert list(batches.epoch(2)) == first


@pytest.mark.parametrize(("seed", "epoch"), [(3, 1), (4, 2)])
def test_another_seed_or_epoch_has_another_order(seed, epoch):
    first = list(LogicalBatches(range(50), Amount(8, "rows"), seed=3).epoch(2))
    assert list(LogicalBatches(range(50), Amount(8, "rows"), seed=seed).epoch(epoch)) != first


def test_a_length_that_is_no_number_of_tokens_is_refused():
    with pytest.raises(SplitError, match="Row 1 of the logical batch is said to be -2 tokens long"):
        of_tokens([3, -2], 10)
