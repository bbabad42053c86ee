"""The novel and the model that reads it."""

import math

import pytest
import torch

import wholebatch as wb
from wholebatch.recipes import text
from wholebatch.recipes.protocol import Recipe


def small(dtype=torch.float64):
    model = text.ByteTransformer(width=16, heads=2, blocks=2).to(dtype)
    torch.nn.init.normal_(model.head.weight, std=0.1)  # at the start it is zero, and nothing depends on anything
    return model


def test_the_paragraphs_are_those_of_the_novel():
    rows = text.paragraphs()
    assert len(rows) == 2126
    assert rows[0] == b"PRIDE AND PREJUDICE"
    assert max(map(len, rows)) == text.LONGEST
    assert min(map(len, rows)) < 20
    assert not any(bytes([text.PADDING]) in row or b"\n" in row for row in rows)


def test_a_fixed_tenth_is_held_out():
    train, validation = text.data("train"), text.data("validation")
    assert (len(train), len(validation)) == (1914, 212)
    assert sorted([*train, *validation]) == sorted(text.paragraphs())
    assert text.data("validation") == validation


def test_rows_are_padded_to_the_longest():
    padded = text.collate([b"ab", b"c"])
    assert padded.tolist() == [[97, 98], [99, 0]]
    assert padded.dtype == torch.int64


def test_padding_adds_nothing_to_the_loss():
    """The loss of a batch is the sum of its rows' losses, up to rounding, although they were padded."""
    model, rows = small(), list(text.data("validation")[:6])
    together, targets = text.loss(model, text.collate(rows))
    alone = [text.loss(model, text.collate([row])) for row in rows]
    assert targets == sum(map(len, rows)) == sum(counted for _, counted in alone)
    assert len(set(map(len, rows))) > 1
    assert together.item() == pytest.approx(sum(loss.item() for loss, _ in alone), rel=1e-14)


def test_no_byte_sees_itself_or_a_later_one():
    model = small()
    row = text.collate([b"It is a truth universally acknowledged"])
    changed = row.clone()
    changed[0, 20] += 1
    first, second = model(row)[0], model(changed)[0]
    assert torch.equal(first[:21], second[:21])
    assert (first[21:] != second[21:]).all(dim=1).all()


def test_an_untrained_model_needs_eight_bits():
    assert text.measure(text.model().eval(), text.data("validation")[:40])["bits_per_byte"] == pytest.approx(8)


def test_bits_are_the_loss_in_another_unit():
    model, rows = small(), text.data("validation")[:40]
    loss_sum, targets = text.loss(model, text.collate(list(rows)))
    bits = text.measure(model, rows)["bits_per_byte"]
    assert bits * math.log(2) == pytest.approx((loss_sum / targets).item(), rel=1e-12)


def test_a_few_updates_lower_the_loss():
    recipe, rows = Recipe.of(text, "text"), list(text.data("train")[:48])
    torch.manual_seed(0)
    model = text.ByteTransformer(width=16, heads=2, blocks=1)
    accumulator = wb.Accumulator(
        model,
        recipe.optimizer(model),
        recipe.loss,
        micro_batch=wb.Tokens(2048, length=recipe.length),
        collate=recipe.collate,
    )
    losses = [accumulator.step(rows).loss for _ in range(6)]
    assert losses[0] == pytest.approx(math.log(256), rel=1e-6)
    assert losses[-1] < 0.75 * losses[0]


def test_every_parameter_is_learnt_at_one_of_two_rates():
    model = text.model()
    groups = text.optimizer(model).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert groups[0]["lr"] > groups[1]["lr"]
    assert [id(weight) for weight in groups[0]["params"]] == [
        id(layer.weight) for layer in (model.embedding, model.position, model.head)
    ]
