"""The user's model, cut and uncut: the causes are named, sound models pass, and no trace is left."""

import json

import pytest
import torch
from torch import nn

import wholebatch as wb
from menagerie import (
    BATCH_NORM,
    CALM,
    CONTRASTIVE,
    DROPOUT,
    MIXED,
    NOISY,
    Animal,
    TiedHead,
    mean_over_labels,
    mean_square,
    mlp,
    num_labels,
    numbers,
    regression,
    sum_over_labels,
    texts,
)
from properties import assert_leaves_no_trace


def verified(animal, rows=10, dtype=torch.float64, **options):
    model = animal.model(dtype)
    batch = animal.batch(rows, dtype)
    return wb.verify(model, animal.loss_fn, batch, **{**animal.objective, **options})


def counts_the_padding(batch):
    return batch["labels"].numel()


WRONG = {
    "batch norm": (BATCH_NORM, "training mode compute over the rows that they are given: 1."),
    "dropout": (DROPOUT, "other masks when the batch is cut: 0, 2."),
    "randomness": (NOISY, "draw random numbers"),
    "reduction: a sum": (Animal(TiedHead, texts, sum_over_labels, num_labels), "a sum, declared as a mean"),
    "reduction: a mean": (Animal(TiedHead, texts, mean_over_labels, num_labels, "sum"), "a mean, declared as a sum"),
    "targets": (Animal(TiedHead, texts, mean_over_labels, counts_the_padding), "as declared"),
    "targets: rows": (Animal(TiedHead, texts, mean_over_labels), "does not average over the targets"),
    "not a sum over rows": (CONTRASTIVE, "No weights turn the gradients of the parts into that of the whole"),
}


@pytest.mark.parametrize("kept", [[1, 0, 0], [0, 1, 1], [0, 0, 1]], ids=str)
def test_a_masked_mean_that_is_no_number_in_a_part_has_its_cause_named(kept):
    """The batch is finite as a whole: it is the cut that leaves a part without anything to average over."""
    batch = regression(12, torch.float64) | {"kept": torch.tensor(kept, dtype=torch.bool).repeat_interleave(4)}

    def masked_mean(model, part):
        return ((model(part["x"]) - part["y"]) ** 2)[part["kept"]].mean()

    torch.manual_seed(0)
    found = wb.verify(mlp().double(), masked_mean, batch)
    assert not found.ok
    assert [cause.name for cause in found.causes] == ["targets"]
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["ok"] is False
    assert wb.verify(mlp().double(), masked_mean, batch, targets=lambda part: part["kept"].sum() * 3).ok


@pytest.mark.parametrize("with_step", [False, True])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_batch_that_is_not_finite_as_a_whole_is_refused(kind, with_step):
    def loss_fn(model, part):
        root = (model(part["x"]) * 0).sum(dim=1).sqrt().mean()  # 0, and its gradient is not a number
        return mean_square(model, part) + (root if kind == "gradient" else root / 0)

    def step(model, optimizer, micro_batches):
        for part in micro_batches:
            (loss_fn(model, part) / len(micro_batches)).backward()
        optimizer.step()

    with pytest.raises(wb.NonFiniteError, match=f"not finite as a whole: its {kind} is") as error:
        wb.verify(mlp().double(), loss_fn, regression(6, torch.float64), step=step if with_step else None)
    assert "divisions" in error.value.hint


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_cause_is_named(wrong, dtype):
    animal, found = WRONG[wrong]
    verification = verified(animal, dtype=dtype)
    assert not verification.ok
    assert verification.error > 1e-3
    (cause,) = verification.causes
    assert cause.name == wrong.partition(":")[0]
    assert found in cause.found
    assert cause.hint
    assert verification.cause == f"{cause.name}: {cause.found}"


def test_several_causes_are_named_together():
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    verification = wb.verify(model, mean_square, regression(10, torch.float64), reduction="sum")
    assert [cause.name for cause in verification.causes] == ["batch norm", "reduction", "dropout"]


def test_batch_norm_and_randomness_alone_are_not_called_anything_else():
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    verification = wb.verify(model, mean_square, regression(10, torch.float64))
    assert [cause.name for cause in verification.causes] == ["batch norm", "dropout"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("micro_batch", [None, wb.Rows(1), wb.Rows(4), wb.Rows(99)], ids=str)
@pytest.mark.parametrize("name", CALM)
def test_there_is_no_false_alarm(name, micro_batch, dtype):
    verification = verified(CALM[name], micro_batch=micro_batch, dtype=dtype)
    assert verification.ok, str(verification)
    assert verification.causes == ()
    assert verification.cause is None
    verification.raise_if_not_ok()


@pytest.mark.parametrize("name", ["mlp", "convolution", "shared weights", "sparse gradients"])
def test_there_is_no_false_alarm_in_16_bits(name):
    assert verified(CALM[name], dtype=torch.bfloat16).ok


def test_there_is_no_false_alarm_for_weights_of_two_dtypes():
    verification = verified(MIXED, dtype=torch.float32)
    assert verification.ok
    assert verification.eps == torch.finfo(torch.bfloat16).eps


def test_gradients_that_cancel_to_nothing_are_no_alarm():
    """At the optimum the gradient of the whole is rounding; it is measured by what the parts hold."""
    model = nn.Linear(5, 3).double()
    x = numbers(10, 5)
    y = model(x).detach() + numbers(10, 3, seed=1)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(10, 1)], 1), y).solution
    with torch.no_grad():
        model.weight.copy_(solution[:5].T)
        model.bias.copy_(solution[5])
    assert wb.verify(model, mean_square, {"x": x, "y": y}).ok


def test_a_gradient_that_is_zero_is_equal():
    model = nn.Linear(5, 3).double()
    verification = wb.verify(model, lambda m, b: m(b["x"]).mul(0).mean(), regression(6, torch.float64))
    assert verification.ok
    assert verification.error == 0.0


def test_a_gradient_that_is_not_a_number_is_not_equal():
    """The whole batch meets a 0 / 0 in its last parameter that no part meets."""

    def loss_fn(model, batch):
        loss = mean_square(model, batch)
        return loss + (model[2].bias * 0).sqrt().sum() if len(batch["x"]) > 4 else loss

    assert not wb.verify(mlp().double(), loss_fn, regression(9, torch.float64)).ok


@pytest.mark.parametrize("wrong", WRONG)
def test_verify_leaves_no_trace(wrong):
    animal, _ = WRONG[wrong]
    model, batch = animal.model(), animal.batch(10, torch.float64)
    animal.loss_fn(model, batch).backward()
    with assert_leaves_no_trace(model):
        wb.verify(model, animal.loss_fn, batch, **animal.objective)


def test_a_model_that_returns_no_loss_in_evaluation_mode_is_told_that_it_is_random():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = DROPOUT.build()

        def forward(self, x):
            return {"loss": self.layers(x).square().mean()} if self.training else {"boxes": x}

    model = Detector()
    with assert_leaves_no_trace(model):
        verification = wb.verify(model, lambda m, b: m(b["x"])["loss"], regression(10, torch.float32))
    assert [cause.name for cause in verification.causes] == ["dropout"]


def test_verify_leaves_no_trace_when_the_loss_function_raises():
    def stumbling(model, batch):
        if len(batch["x"]) > 4:
            raise ArithmeticError
        return mean_square(model, batch)

    model = BATCH_NORM.model()
    mean_square(model, regression(5, torch.float64)).backward()
    with assert_leaves_no_trace(model), pytest.raises(ArithmeticError):
        wb.verify(model, stumbling, regression(9, torch.float64))


def test_an_open_window_is_left_alone():
    model = mlp().double()
    accumulator = wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=1.0))
    window = accumulator.window()
    window.backward(mean_square(model, regression(4, torch.float64)), targets=4)
    assert wb.verify(model, mean_square, regression(6, torch.float64)).ok
    window.backward(mean_square(model, regression(4, torch.float64)), targets=4)
    assert window.close().targets == 8


def test_rows_by_length_are_verified_as_they_are_cut():
    rows = [numbers(length, 5, seed=length) for length in (7, 2, 9, 4, 1)]

    def loss_fn(model, x):
        mask = x.abs().sum(2) > 0
        return (model(x).square().sum(2) * mask).sum(), mask.sum()

    def pad(some):
        return nn.utils.rnn.pad_sequence(some, batch_first=True)

    verification = wb.verify(mlp().double(), loss_fn, rows, micro_batch=wb.Tokens(10, length=len), collate=pad)
    assert verification.ok
    cut = wb.Tokens(10, length=len).cut([len(row) for row in rows])
    assert (verification.rows, verification.micro_batches) == (5, len(cut))


def test_a_wrong_mask_is_found_in_rows_by_length():
    rows = [numbers(length, 5, seed=length) for length in (7, 2, 9, 4, 1)]

    def pad(some):
        return nn.utils.rnn.pad_sequence(some, batch_first=True)

    def over_padding(model, x):
        return model(x).square().mean()

    verification = wb.verify(mlp().double(), over_padding, rows, micro_batch=wb.Tokens(10, length=len), collate=pad)
    assert not verification.ok


def test_a_verification_speaks():
    good, bad = verified(CALM["mlp"]), verified(WRONG["targets"][0])
    assert str(good).startswith("equal: the gradient of 10 rows as a whole and in 3 micro-batches differs by")
    assert "cause: targets." in str(bad)
    assert "hint: let targets=... count exactly" in str(bad)
    assert "worst parameters: " in str(bad)
    with pytest.raises(wb.VerifyError, match="not equal") as error:
        bad.raise_if_not_ok()
    assert error.value.hint == bad.causes[0].hint


@pytest.mark.parametrize("wrong", [None, "targets"])
def test_a_verification_is_plain_values(wrong):
    verification = verified(WRONG[wrong][0] if wrong else CALM["mlp"])
    plain = verification.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["ok"] is (wrong is None)
    assert [cause["name"] for cause in plain["causes"]] == ([wrong] if wrong else [])
    assert set(plain["by_parameter"]) == {name for name, _ in (TiedHead() if wrong else mlp()).named_parameters()}


@pytest.mark.parametrize(
    ("batch", "kind", "found"),
    [
        (regression(1, torch.float32), wb.SplitError, "one row cannot be cut"),
        ({"x": torch.ones(4, 5), "y": torch.ones(3, 3)}, wb.SplitError, "disagree"),
        ({"x": torch.ones(4, 5), "y": torch.full((4, 3), float("nan"))}, wb.NonFiniteError, "loss is nan"),
    ],
)
def test_a_batch_that_cannot_be_verified_is_refused(batch, kind, found):
    model = mlp()
    with assert_leaves_no_trace(model), pytest.raises(kind, match=found) as error:
        wb.verify(model, mean_square, batch)
    assert error.value.hint


def test_a_batch_without_targets_cannot_be_verified():
    animal = CALM["shared weights"]
    model, batch = animal.model(), animal.batch(6, torch.float64)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with assert_leaves_no_trace(model), pytest.raises(wb.WeightError, match="nothing to compare"):
        wb.verify(model, animal.loss_fn, batch, targets=num_labels)


def test_a_model_in_which_nothing_learns_cannot_be_verified():
    with pytest.raises(wb.OptimizerError, match="None of the model's parameters requires a gradient"):
        wb.verify(mlp().requires_grad_(False), mean_square, regression(6, torch.float32))


def test_what_is_no_module_cannot_be_verified():
    with pytest.raises(wb.OptimizerError, match="model is a function") as error:
        wb.verify(mean_square, mlp(), regression(4, torch.float32))
    assert "wb.verify(model, loss_fn, batch)" in error.value.hint


def test_a_way_of_cutting_that_is_none_is_refused():
    with pytest.raises(wb.ConfigError, match="micro_batch=3 says nothing"):
        verified(CALM["mlp"], micro_batch=3)


def test_a_step_that_is_none_is_refused():
    with pytest.raises(wb.ConfigError, match="step is a int"):
        verified(CALM["mlp"], step=3)


def test_a_term_that_acts_once_may_be_none():
    """As the accumulator takes it: nothing to add this time."""

    def loss_fn(model, batch):
        return (model(batch["x"]) - batch["y"]).square().sum(), batch["y"].numel(), None

    assert wb.verify(torch.nn.Linear(5, 3).double(), loss_fn, regression(12, torch.float64)).ok


@pytest.mark.parametrize("moved", [1e-5, 4.0], ids=["nearly converged", "far from it"])
def test_spectral_norm_is_named_and_called_no_mistake(moved):
    """Its estimate is one step of a power iteration better with every pass; that is neither chance nor a wrong loss."""
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(5, 7))
    model = torch.nn.Sequential(layer, torch.nn.Tanh(), torch.nn.Linear(7, 3)).double()
    with torch.no_grad():
        weight = layer.parametrizations.weight.original
        weight.add_(moved * torch.randn_like(weight))
    verification = wb.verify(model, mean_square, regression(12, torch.float64))
    assert not verification.ok
    assert [cause.name for cause in verification.causes] == ["spectral norm"]
    assert "no mistake" in verification.causes[0].hint
