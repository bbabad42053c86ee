"""What a model keeps for later passes in places of its own, such as a mask for each length, is never a stand-in."""

import functools

import pytest
import torch
from torch import nn

import wholebatch as wb

TEXTS = [torch.arange(length) % 7 for length in (3, 9, 5, 12, 4, 9, 7, 12)]


class OnItself:
    """A table of a mask for each length, in an attribute of the model."""

    def __init__(self):
        self.table = {}

    def __call__(self, length):
        if length not in self.table:
            self.table[length] = torch.ones(length, length, dtype=torch.bool).tril()
        return self.table[length]


class Longest:
    """The longest mask so far, in a list, of which shorter texts take a part."""

    def __init__(self):
        self.held = []

    def __call__(self, length):
        if not self.held or len(self.held[0]) < length:
            self.held[:] = [torch.ones(length, length, dtype=torch.bool).tril()]
        return self.held[0][:length, :length]


def of_functools():
    return functools.cache(lambda length: torch.ones(length, length, dtype=torch.bool).tril())


class Reader(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask
        self.embed = nn.Embedding(7, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 7)

    def forward(self, tokens):
        x = self.embed(tokens)
        scores = (self.mix(x) @ x.mT).masked_fill(~self.mask(tokens.shape[1]), -torch.inf)
        return self.head(scores.softmax(dim=-1) @ x)


def next_token(model, padded):
    labels = padded[:, 1:]
    logits = model(padded[:, :-1].clamp(min=0))
    return nn.functional.cross_entropy(logits.mT, labels, reduction="sum"), (labels >= 0).sum()


def pad(texts):
    return nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-100)


def assert_works_on_every_length(model):
    for length in range(1, 13):
        assert type(model(torch.zeros(2, length, dtype=torch.long))) is torch.Tensor


CACHE = pytest.mark.parametrize("cache", [OnItself, Longest, of_functools], ids=lambda cache: cache.__name__)


@CACHE
@pytest.mark.parametrize("options", [{}, {"length": len}], ids=["rows", "lengths"])
def test_a_plan_leaves_no_stand_ins_in_the_caches_of_a_model(cache, options):
    torch.manual_seed(0)
    model = Reader(cache())
    optimizer = torch.optim.SGD(model.parameters())
    plan = wb.plan(
        model, optimizer, next_token, TEXTS, logical_batch=64, memory="300KB", collate=pad, timed=False, **options
    )
    assert_works_on_every_length(model)
    largest = plan.largest()
    predicted = wb.plan(
        model, optimizer, next_token, TEXTS, logical_batch=64, memory="300KB", collate=pad, timed=False, **options
    )
    assert predicted.largest() == largest  # what was kept by then changes nothing


@CACHE
def test_a_budget_that_was_too_small_leaves_no_stand_ins_either(cache):
    torch.manual_seed(0)
    model = Reader(cache())
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(wb.OutOfMemoryError, match="does not hold one row"):
        wb.Accumulator(model, optimizer, next_token, collate=pad, memory="4KB").step(TEXTS)
    assert_works_on_every_length(model)
    assert wb.Accumulator(model, optimizer, next_token, collate=pad, memory="300KB").step(TEXTS).applied
