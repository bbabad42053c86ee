"""The functions, and the encoders that find a body by its docstring among all rows of the logical batch."""

import copy

import pytest
import torch

import wholebatch as wb
from wholebatch.recipes import pairs
from wholebatch.recipes.protocol import Recipe


def test_functions_are_split_five_to_one_and_none_is_in_both():
    train, validation = pairs.data("train"), pairs.data("validation")
    assert (len(train), len(validation)) == (2500, 500)
    assert sum(row in train for row in validation[:50]) < 5  # a few functions of the library are written twice


def test_names_are_taken_apart_and_cut():
    assert pairs.words("readLine", 9) == pairs.words("read_line", 9) == pairs.words("READ line", 9)
    assert len(pairs.words("a b c d", 3)) == 3
    assert pairs.words("...", 9) == [pairs.NO_WORD]


def test_the_signature_is_not_read():
    """With the name of the function on both sides the question would answer itself."""
    assert pairs._body("def name(self):\n    return 1") == "    return 1"
    assert pairs._body("lambda: 1") == "lambda: 1"


def test_padding_and_neighbours_change_no_text():
    model = pairs.DualEncoder(8).double()
    torch.nn.init.normal_(model.doc.weight.weight)
    rows = list(pairs.data("train")[:6])
    together, alone = model(*pairs.collate(rows)), model(*pairs.collate(rows[:1]))
    for both, one in zip(together, alone, strict=True):
        assert both[0].tolist() == pytest.approx(one[0].tolist(), rel=1e-9)


def test_retrieval_is_the_share_of_rows_found():
    rows = pairs.data("validation")[:150]

    class Knowing(pairs.DualEncoder):
        """Knows the first 30 rows of each hundred, and takes all others for the first."""

        def forward(self, docs, bodies):
            place = torch.arange(len(docs)) if not hasattr(self, "seen") else torch.arange(len(docs)) + 100
            self.seen = True
            points = torch.eye(150)[place]
            return torch.where((place % 100 < 30).unsqueeze(1), points, torch.eye(150)[:1]), points

    assert pairs.measure(Knowing(), rows) == {"retrieval_at_1": 60 / 150}


def change_of(lockstep_rows, rows):
    torch.manual_seed(0)
    model = pairs.DualEncoder(8).double()
    before = copy.deepcopy(model.state_dict())
    accumulator = wb.Accumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        pairs.loss,
        micro_batch=wb.Rows(lockstep_rows),
        collate=pairs.collate,
        check=None,
    )
    accumulator.step(rows)
    return torch.cat([(each - before[name]).flatten() for name, each in model.state_dict().items()])


def off(change, right):
    return float((change - right).norm() / right.norm())


def test_every_row_is_told_from_all_rows_of_the_logical_batch():
    rows = list(pairs.data("train")[:23])
    assert off(change_of(5, rows), change_of(23, rows)) < 1e-12


def test_the_bound_sees_micro_batches_that_do_not_meet():
    rows = list(pairs.data("train")[:24])
    alone = torch.stack([change_of(6, rows[start : start + 6]) for start in range(0, 24, 6)]).mean(0)
    assert off(alone, change_of(24, rows)) > 0.1


def test_a_few_updates_find_some_bodies():
    recipe, rows = Recipe.of(pairs, "pairs"), list(pairs.data("train")[:256])
    torch.manual_seed(0)
    model = pairs.DualEncoder(32)
    accumulator = wb.Accumulator(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        recipe.loss,
        micro_batch=wb.Rows(64),
        collate=recipe.collate,
    )
    untrained = pairs.measure(model, rows)["retrieval_at_1"]
    for _ in range(12):
        accumulator.step(rows)
    assert pairs.measure(model, rows)["retrieval_at_1"] > untrained + 0.2
