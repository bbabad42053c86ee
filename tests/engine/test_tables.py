"""Tables of positions that grow with the longest text: a buffer, and the number beside it that says how far it goes."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import wholebatch as wb
from properties import flat, relative_error

VOCABULARY = 11
LENGTHS = (4, 3, 9, 2, 12, 5, 17)
"""A short one first, so that the table grows in the middle of a window."""
TEXTS = [torch.arange(length) * 3 % VOCABULARY for length in LENGTHS]


class Positions(nn.Module):
    """Cosines of positions, computed as far as they have been asked for, as in rotary embeddings.

    Args:
        kept: ``"replaced"``: a longer table is another buffer; ``"data"``: it is put into the same buffer; ``"none"``:
            there is no buffer before the first pass.
        length: How far the table goes at first.
    """

    def __init__(self, kept, length=3):
        super().__init__()
        self.kept = kept
        self.known = 0
        self.register_buffer("table", None if kept == "none" else torch.zeros(0, dtype=torch.float64))
        if kept != "none":
            self.grow(length)

    def grow(self, length):
        self.known = length
        table = (torch.arange(length, dtype=torch.float64) / 7).cos()
        if self.kept == "data":
            self.table.data = table
        else:
            self.table = table

    def forward(self, x):
        if x.shape[1] > self.known:
            self.grow(x.shape[1])
        return x * self.table[: x.shape[1], None]


class Registers(nn.Module):
    """The same, without any buffer before the first pass, and with the number in the module around it."""

    class Table(nn.Module):
        pass

    def __init__(self):
        super().__init__()
        self.inner = self.Table()
        self.known = 0

    def grow(self, length):
        self.known = length
        self.inner.register_buffer("table", (torch.arange(length, dtype=torch.float64) / 7).cos(), persistent=False)

    def forward(self, x):
        if x.shape[1] > self.known:
            self.grow(x.shape[1])
        return x * self.inner.table[: x.shape[1], None]

    @property
    def table(self):
        return getattr(self.inner, "table", None)


class Block(nn.Module):
    def __init__(self, kept):
        super().__init__()
        self.positions = Positions(kept) if kept != "registered" else Registers()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.layer(self.positions(x)).tanh()


def reader(kept):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Embedding(VOCABULARY, 6), nn.ModuleList([Block(kept), Block(kept)]), nn.Linear(6, VOCABULARY)
    ).double()


def logits(model, tokens):
    x = model[0](tokens)
    for block in model[1]:
        x = block(x)
    return model[2](x)


def pad(texts):
    return nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-100)


def next_token(model, padded):
    labels = padded[:, 1:]
    said = cross_entropy(logits(model, padded[:, :-1].clamp(min=0)).mT, labels, reduction="sum")
    return said, (labels != -100).sum()


def meeting(model, padded):
    """The same, and a term that all rows have together."""
    said, targets = next_token(model, padded)
    each = logits(model, padded[:, :2].clamp(min=0)).square().sum(dim=(1, 2))
    return said, targets, wb.gather(each).std()


def right(kept, loss_fn=next_token):
    """The gradient of the undivided batch, with a table that is long enough from the beginning."""
    model = reader(kept)
    for module in model.modules():
        if isinstance(module, Positions | Registers):
            module.grow(40)
    said = loss_fn(model, pad(TEXTS))
    loss = said[0] / said[1] + sum(said[2:])
    return flat(torch.autograd.grad(loss, list(model.parameters())))


def change(model, train):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train()
    return flat(old - new.detach() for old, new in zip(before, model.parameters(), strict=True))


def accumulator_of(model, loss_fn=next_token, **options):
    return wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=1.0), loss_fn, collate=pad, **options)


KEPT = pytest.mark.parametrize("kept", ["replaced", "data", "none", "registered"])


@KEPT
@pytest.mark.parametrize(
    "options", [{"micro_batch": wb.Rows(2)}, {"memory": "100KB"}, {}], ids=["rows", "memory", "whole"]
)
def test_a_table_that_grew_in_a_look_at_the_model_is_as_long_as_it_says(kept, options):
    """The first check and the probe are undone: table and number together."""
    model = reader(kept)
    accumulator = accumulator_of(model, **options)
    assert relative_error(change(model, lambda: accumulator.step(TEXTS)), right(kept)) <= 1e-12


@KEPT
def test_a_table_that_grew_in_a_skipped_window_goes_back_with_its_number(kept):
    model = reader(kept)
    tables = [module for module in model.modules() if isinstance(module, Positions | Registers)]
    before = [(table.known, table.table) for table in tables]
    lengths = [None if table is None else len(table) for _, table in before]
    accumulator = accumulator_of(model, lambda model, padded: (next_token(model, padded)[0] * torch.nan, 1), check=None)
    assert accumulator.step(TEXTS).skipped == "the loss is nan"
    assert [(table.known, table.table) for table in tables] == before
    assert [None if table.table is None else len(table.table) for table in tables] == lengths
    assert logits(model, TEXTS[-1][None]).shape == (1, 17, VOCABULARY)


@KEPT
def test_a_table_grows_inside_a_block_that_recomputes(kept):
    model = reader(kept)
    wb.checkpoint_blocks(model, ["1.0", "1.1"])
    accumulator = accumulator_of(model, micro_batch=wb.Rows(2))
    assert relative_error(change(model, lambda: accumulator.step(TEXTS)), right(kept)) <= 1e-12


@KEPT
@pytest.mark.parametrize("lockstep", ["replay", "joined"])
def test_a_table_grows_between_two_passes_over_micro_batches_that_meet(kept, lockstep):
    model = reader(kept)
    accumulator = accumulator_of(model, meeting, micro_batch=wb.Rows(2), lockstep=lockstep)
    assert relative_error(change(model, lambda: accumulator.step(TEXTS)), right(kept, meeting)) <= 1e-12


@KEPT
def test_a_model_with_a_table_is_certified_and_works_afterwards(kept):
    model = reader(kept)
    assert wb.verify(model, next_token, TEXTS, collate=pad, micro_batch=wb.Rows(2)).ok
    assert logits(model, TEXTS[-1][None]).shape == (1, 17, VOCABULARY)
