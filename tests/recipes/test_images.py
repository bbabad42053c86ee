"""The pictures and the network that tells them apart."""

from collections import Counter

import pytest
import torch
from torch import nn

import wholebatch as wb
from wholebatch.recipes import images
from wholebatch.recipes.protocol import Recipe


def test_there_are_equally_many_pictures_of_each_kind():
    for split, pictures in (("train", 200), ("validation", 50)):
        rows = images.data(split)
        assert Counter(kind for _, kind in rows) == dict.fromkeys(range(images.KINDS), pictures)
        assert {(tuple(picture.shape), picture.dtype) for picture, _ in rows} == {((28, 28), torch.uint8)}


def test_pictures_are_scaled_to_plus_and_minus_one():
    pictures, kinds = images.collate(list(images.data("train")[:100]))
    assert pictures.shape == (100, 1, 28, 28)
    assert (pictures.min().item(), pictures.max().item()) == (-1, 1)
    assert kinds.tolist() == [kind for _, kind in images.data("train")[:100]]


def test_accuracy_is_the_share_of_rows_told_rightly():
    rows = images.data("validation")[:150]
    share = sum(kind == 3 for _, kind in rows) / len(rows)
    assert 0 < share < 1

    class AlwaysThree(nn.Module):
        def __init__(self):
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros(()))

        def forward(self, pictures):
            return nn.functional.one_hot(torch.full((len(pictures),), 3), images.KINDS)

    assert images.measure(AlwaysThree(), rows) == {"accuracy": share}


def test_no_picture_sees_another():
    model = images.model().double()
    pictures, _ = images.collate(list(images.data("train")[:4]))
    together, alone = model(pictures.double()), model(pictures[:1].double())
    assert together[0].tolist() == pytest.approx(alone[0].tolist(), rel=1e-12)


def test_a_few_updates_lower_the_loss():
    recipe, rows = Recipe.of(images, "images"), list(images.data("train")[::16])
    torch.manual_seed(0)
    model = images.model()
    accumulator = wb.Accumulator(
        model,
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        recipe.loss,
        micro_batch=wb.Rows(32),
        collate=recipe.collate,
    )
    losses = [accumulator.step(rows).loss for _ in range(8)]
    assert losses[-1] < 0.6 * losses[0]
