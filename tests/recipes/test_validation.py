"""The loss of rows that were not trained on: the same however they are cut, and the model none the wiser."""

import math
from contextlib import nullcontext

import pytest
import torch
from tiny import Tiny
from torch import nn

import wholebatch as wb
from wholebatch.core.errors import ConfigError
from wholebatch.recipes.protocol import Recipe
from wholebatch.recipes.validation import mean_loss, validate


def parts(tiny=None):
    tiny = tiny or Tiny()
    return tiny.model(), Recipe.of(tiny, "tiny"), tiny.data("validation")


def whole_loss(model, recipe, rows):
    loss_sum, targets = recipe.loss(model, recipe.collate(list(rows)))
    return (loss_sum / targets).item()


CUTS = [wb.Rows(1), wb.Rows(3), wb.Rows(100), wb.Tokens(1, length=len), wb.Tokens(20, length=len)]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_loss_is_that_of_all_rows_at_once(cut):
    model, recipe, rows = parts()
    assert mean_loss(model, recipe, rows, cut) == pytest.approx(whole_loss(model, recipe, rows), rel=1e-14)


def test_the_bound_sees_a_mean_of_means():
    """The mistake that weighing by targets prevents is far outside the bound above."""
    model, recipe, rows = parts()
    means = [whole_loss(model, recipe, rows[start : start + 3]) for start in range(0, len(rows), 3)]
    assert sum(means) / len(means) != pytest.approx(whole_loss(model, recipe, rows), rel=1e-3)


class OfRows(Tiny):
    """The loss alone, as a mean or a sum over its targets."""

    def __init__(self, reduction, counts_numbers):
        super().__init__()
        self.reduction = reduction
        if counts_numbers:
            self.targets = lambda micro_batch: (micro_batch >= 0).sum()

    def loss(self, model, micro_batch):
        loss_sum, _ = super().loss(model, micro_batch)
        targets = self.targets(micro_batch) if hasattr(self, "targets") else len(micro_batch)
        return loss_sum / targets if self.reduction == "mean" else loss_sum


@pytest.mark.parametrize("counts_numbers", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_way_to_declare_the_loss_gives_its_mean(cut, reduction, counts_numbers):
    model, recipe, rows = parts(OfRows(reduction, counts_numbers))
    per_target = whole_loss(model, Recipe.of(Tiny(), "tiny"), rows)
    expected = per_target if counts_numbers else per_target * sum(map(len, rows)) / len(rows)
    assert mean_loss(model, recipe, rows, cut) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("nothing", [None, (torch.tensor(math.nan), 0)], ids=["None", "nan"])
def test_rows_without_a_target_add_nothing(nothing):
    class Masked(Tiny):
        def loss(self, model, micro_batch):
            return nothing if len(micro_batch[0]) == 1 else super().loss(model, micro_batch)

    model, recipe, rows = parts(Masked())
    longer = [row for row in rows if len(row) > 1]
    assert 0 < len(longer) < len(rows)
    assert mean_loss(model, recipe, rows, wb.Rows(1)) == pytest.approx(whole_loss(model, recipe, longer), rel=1e-14)
    assert math.isnan(mean_loss(model, recipe, [torch.zeros(1, dtype=torch.float64)], wb.Rows(1)))


def test_the_model_is_evaluated_without_gradients_and_every_module_gets_its_mode_back():
    tiny = Tiny()
    model, recipe, rows = parts(tiny)
    model[1].eval()
    measures = validate(model, recipe, rows, micro_batch=wb.Rows(4), autocast=nullcontext)
    assert set(tiny.modes) == {(False, False)}
    assert [module.training for module in model] == [True, False, True]
    assert model.training
    assert measures == {"loss": measures["loss"], "rows_seen": 10.0, "training": 0.0}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_modes_come_back_when_the_loss_fails():
    def fail(_number):
        raise ZeroDivisionError

    model, recipe, rows = parts(Tiny(on_loss=fail))
    with pytest.raises(ZeroDivisionError):
        validate(model, recipe, rows, micro_batch=wb.Rows(4), autocast=nullcontext)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("returned", [None, 0.5, {"accuracy": "high"}, {"accuracy": torch.zeros(2)}], ids=str)
def test_measures_that_are_no_numbers_are_refused(returned):
    class Odd(Tiny):
        def measure(self, model, rows):
            return returned

    model, recipe, rows = parts(Odd())
    with pytest.raises(ConfigError, match="`measure` of tiny returned"):
        validate(model, recipe, rows, micro_batch=wb.Rows(4), autocast=nullcontext)


def test_the_precision_of_training_is_that_of_validation():
    class Linear(Tiny):
        seen = None

        def model(self):
            return nn.Linear(1, 1)

        def loss(self, model, micro_batch):
            out = model(micro_batch.float().unsqueeze(-1))
            self.seen = out.dtype
            return out.sum().double(), out.numel()

    tiny = Linear()
    model, recipe, rows = parts(tiny)
    validate(model, recipe, rows, micro_batch=wb.Rows(4), autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert tiny.seen == torch.bfloat16
