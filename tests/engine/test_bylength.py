"""``micro_batch="auto"`` on rows of varying length: sorted, cut by what each length takes, within the budget."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import wholebatch as wb
from wholebatch.core.budget import parse_bytes
from wholebatch.core.split import Rows, padding
from wholebatch.engine import memory
from wholebatch.engine.fit.lengths import lengths_of


@pytest.mark.parametrize(
    ("rows", "lengths"),
    [
        (["abc", "d"], [3, 1]),
        ([b"abc", b"d"], [3, 1]),
        ([torch.ones(3, 2), torch.ones(5, 2)], [3, 5]),
        ([np.ones(3), np.ones(1)], [3, 1]),
        ([{"ids": [1, 2], "mask": [1, 1], "label": 0}, {"ids": [1], "mask": [1], "label": 1}], [2, 1]),
        ([([1, 2, 3], 5), ([], 6)], [3, 0]),
        ([{"ids": torch.ones(4), "more": torch.ones(9)}, {"ids": torch.ones(2), "more": torch.ones(8)}], [9, 8]),
        ([range(3), range(1)], [3, 1]),
        (["abc", "def"], None),  # all alike
        ([("ab", "x"), ("a", "xyz")], None),  # vary apart
        ([torch.ones(3, 2), torch.ones(2, 3)], None),
        ([{"a": "x"}, {"b": "xyz"}], None),  # built differently
        ([["ab", "c"], ["ab"]], None),
        ([1, 2], None),
        ([], None),
    ],
    ids=str,
)
def test_lengths_are_told_where_one_number_tells(rows, lengths):
    assert lengths_of(rows) == lengths


class Attention(nn.Module):
    """Takes memory with the square of the length."""

    def __init__(self, width=16, dropout=0.0):
        super().__init__()
        self.embed, self.out = nn.Embedding(32, width), nn.Linear(width, 32)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids):
        x = self.embed(ids)
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 4 + (ids == 0)[:, None] * -1e9
        return self.out(self.dropout(x + scores.softmax(-1) @ self.value(x)))


def collate(rows):
    return nn.utils.rnn.pad_sequence([torch.tensor(row["ids"]) for row in rows], batch_first=True)


def loss_fn(model, ids):
    logits = model(ids)
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=0, reduction="sum")


def count(ids):
    return int((ids != 0).sum())


def drawn(seed, rows=64, longest=120):
    draw = random.Random(seed)
    lengths = [min(longest, max(2, int(draw.lognormvariate(2.7, 0.9)))) for _ in range(rows)]
    return [{"ids": [draw.randint(1, 31) for _ in range(length)], "label": 0} for length in lengths]


def accumulator_of(model, *, loss=loss_fn, **options):
    return wb.Accumulator(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        loss,
        targets=count,
        reduction="sum",
        collate=collate,
        check=None,
        **options,
    )


def tensor_bytes(accumulator, run):
    setup = accumulator._setup
    state = [v for each in setup.optimizers for s in each.state.values() for v in s.values()]
    before = sum(each.numel() * each.element_size() for each in [*setup.model.parameters(), *state])
    with memory.tensor_peak() as peak:
        made = run()
    return before + peak.peak_bytes, made


@pytest.fixture
def largest(monkeypatch):
    monkeypatch.setattr(
        "wholebatch.engine.fit.bylength.fastest_of", lambda _probe, most, *_: (most, "")
    )  # the clock of a busy machine is no judge


@pytest.mark.parametrize(("budget", "taken"), [("400kB", 0.8), ("800kB", 0.8), ("1500kB", 0.5), ("3MB", 0.25)])
def test_strongly_varying_lengths_keep_the_budget_with_little_padding(budget, taken, largest):
    """The larger the budget, the less of it is taken: micro-batches close before they are full."""
    torch.manual_seed(0)
    accumulator = accumulator_of(Attention(), memory=budget)
    accumulator.step(drawn(0))
    assert "rows are sorted by their lengths" in accumulator.reasons[0]
    shares = []
    for seed in range(1, 8):
        rows = drawn(seed)
        took, update = tensor_bytes(accumulator, lambda rows=rows: accumulator.step(rows))
        assert took <= parse_bytes(budget), accumulator.reasons
        lengths = [len(row["ids"]) for row in rows]
        assert update.padding < 0.5 * padding(lengths, Rows(-(-64 // update.micro_batches)).cut(64))
        shares.append(took / parse_bytes(budget))
    assert max(shares) > taken
    assert len(accumulator.reasons) <= 3  # planned once, and again for longer rows only


@pytest.mark.parametrize(("budget", "said"), [("800kB", "within the 781 KiB"), ("700kB", "more than the 684 KiB")])
def test_a_cut_by_tokens_is_held_against_the_budget_by_what_its_micro_batches_take(budget, said):
    """Many short rows are counted as short ones, of which there are more than would fit of the longest."""
    torch.manual_seed(0)
    micro_batch = wb.Tokens(3000, length=lambda row: len(row["ids"]))
    accumulator = accumulator_of(Attention(), micro_batch=micro_batch, memory=budget)
    rows = drawn(0)
    accumulator.step(rows)
    (reason,) = accumulator.reasons
    assert said in reason
    took, _ = tensor_bytes(accumulator, lambda: accumulator.step(rows))
    assert (took <= parse_bytes(budget)) == ("within" in said)


def test_long_rows_are_cut_finer_than_short_ones_of_the_same_batch(largest):
    """They take memory by the square of their length: half as long, more than twice as many at once."""
    torch.manual_seed(0)
    accumulator = accumulator_of(Attention(), memory="3MB")
    accumulator.step(drawn(0))
    known = accumulator._cutting._by_length
    most = [known.most(length) for length in (120, 60, 30)]
    assert most[1] > 2.5 * most[0]
    assert most[2] > 2.5 * most[1] or most[2] >= 64
    cut = known.cut([120] * 40 + [60] * 40)
    assert len(cut[0]) <= most[0] < len(cut[-1])


def test_the_update_is_that_of_the_undivided_batch():
    rows = drawn(3)

    def run(**options):
        torch.manual_seed(0)
        model = Attention().double()
        accumulator = wb.Accumulator(
            model,
            torch.optim.SGD(model.parameters(), lr=1.0),
            loss_fn,
            targets=count,
            reduction="sum",
            collate=collate,
            check=None,
            **options,
        )
        return copy.deepcopy(model), accumulator.step(rows), list(model.parameters())

    _, cut, found = run(memory="1MB")
    _, whole, right = run(micro_batch=wb.Rows(64))
    assert cut.micro_batches > 1
    assert whole.micro_batches == 1
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_batch_that_fits_is_not_cut_whatever_its_padding():
    torch.manual_seed(0)
    accumulator = accumulator_of(Attention(), memory="1GiB")
    update = accumulator.step(drawn(0))
    assert (update.micro_batches, update.retries) == (1, 0)
    assert "so it is not cut" in accumulator.reasons[0]


def test_a_longer_row_than_any_before_is_planned_anew(largest):
    torch.manual_seed(0)
    accumulator = accumulator_of(Attention(), memory="1500kB")
    accumulator.step(drawn(0, longest=40))
    first = len(accumulator.reasons)
    rows = drawn(1, longest=120)
    took, _ = tensor_bytes(accumulator, lambda: accumulator.step(rows))
    assert len(accumulator.reasons) == first + 1
    assert took <= 1_500_000 + 200_000  # the look ahead included


def test_a_shortage_halves_the_tokens_and_the_same_batch_goes_on(largest):
    room = [10**9]

    def loss(model, ids):
        if ids.numel() > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss_fn(model, ids)

    torch.manual_seed(0)
    accumulator = accumulator_of(Attention(), loss=loss, memory="1500kB")
    first = accumulator.step(drawn(0))
    room[0] = 400
    update = accumulator.step(drawn(0))
    assert update.retries >= 1
    assert update.rows == 64
    assert update.micro_batches > first.micro_batches
    assert accumulator.step(drawn(0)).retries == 0
    assert any("into micro-batches of" in reason and "tokens" in reason for reason in accumulator.reasons)
    room[0] = 10**9
    made = [accumulator.step(drawn(0)) for _ in range(40)]
    assert made[-1].micro_batches == first.micro_batches


def test_rows_whose_lengths_hardly_vary_keep_their_order(largest):
    draw = random.Random(0)
    rows = [{"ids": [1] * draw.choice([40, 41]), "label": 0} for _ in range(64)]
    torch.manual_seed(0)
    accumulator = accumulator_of(Attention(), memory="1MB")
    update = accumulator.step(rows)
    assert update.micro_batches > 1
    assert update.padding is None
    assert not any("sorted" in reason for reason in accumulator.reasons)


def test_layers_that_compute_over_the_batch_keep_the_order_too(largest):
    class Normed(Attention):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(32)

        def forward(self, ids):
            return self.norm(super().forward(ids).transpose(1, 2)).transpose(1, 2)

    torch.manual_seed(0)
    accumulator = accumulator_of(Normed(), memory="1MB", batch_norm="per_micro_batch")
    update = accumulator.step(drawn(0))
    assert update.micro_batches > 1
    assert update.padding is None


def test_where_three_lengths_cannot_be_run_rows_are_counted():
    def picky(model, ids):
        if ids.shape[1] < 20:
            raise ValueError("too short")
        return loss_fn(model, ids)

    torch.manual_seed(0)
    rows = [{"ids": [1] * 60}] * 60 + [{"ids": [1] * 10}] * 4
    random.Random(0).shuffle(rows)
    accumulator = accumulator_of(Attention(), loss=picky, memory="1500kB")
    update = accumulator.step(rows)
    assert update.padding is None
    assert update.rows == 64


def test_a_longest_row_that_does_not_fit_is_an_error_before_training():
    torch.manual_seed(0)
    model = Attention()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(wb.OutOfMemoryError, match="does not hold one row"):
        accumulator_of(model, memory="60kB").step(drawn(0))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Recurrent(nn.Module):
    """Its kernels take memory that no operation tells of."""

    def __init__(self):
        super().__init__()
        self.embed, self.layers, self.out = nn.Embedding(32, 24), nn.GRU(24, 48, 2, batch_first=True), nn.Linear(48, 32)

    def forward(self, ids):
        return self.out(self.layers(self.embed(ids))[0])


@pytest.mark.parametrize("budget", ["1500kB", "3MB"])
def test_what_kernels_take_for_themselves_is_counted_too(budget, largest):
    torch.manual_seed(0)
    accumulator = accumulator_of(Recurrent(), memory=budget)
    longest = {"ids": [1] * 120, "label": 0}
    accumulator.step([longest, *drawn(0)])
    assert "sorted by their lengths" in accumulator.reasons[0]
    for seed in range(1, 4):
        rows = drawn(seed)
        took, update = tensor_bytes(accumulator, lambda rows=rows: accumulator.step(rows))
        assert update.micro_batches > 1
        assert took <= parse_bytes(budget)


def test_a_little_longer_rows_follow_from_those_that_were_looked_at(largest):
    torch.manual_seed(0)
    accumulator = accumulator_of(Attention(), memory="1500kB")
    accumulator.step([{"ids": [1] * 80, "label": 0}, *drawn(0, longest=80)])
    planned = len(accumulator.reasons)
    rows = [{"ids": [1] * 99, "label": 0}] * 8 + drawn(1, longest=80)
    took, _ = tensor_bytes(accumulator, lambda: accumulator.step(rows))
    assert len(accumulator.reasons) == planned
    assert took <= 1_500_000
