"""The first batch, cut and uncut: what is wrong raises, what is random does not, and no trace is left."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import wholebatch as wb
from menagerie import (
    BATCH_NORM,
    CALM,
    CONTRASTIVE,
    DROPOUT,
    IGNORED,
    MIXED,
    NOISY,
    Animal,
    TiedHead,
    mean_over_labels,
    mean_square,
    mlp,
    regression,
    sum_over_labels,
    texts,
)
from properties import assert_leaves_no_trace, flat, relative_error, sgd, state_of, undivided
from wholebatch.core.batch import LogicalBatch
from wholebatch.engine.checks.causes import diagnose
from wholebatch.engine.checks.distance import norm
from wholebatch.engine.checks.flat import flat_gradient, take_gradients
from wholebatch.engine.checks.pieces import Probe
from wholebatch.engine.checks.silence import silenced
from wholebatch.engine.objective import Objective


def accumulator_of(animal, model, **options):
    options = {"micro_batch": wb.Rows(4), **animal.objective, **options}
    return wb.Accumulator(model, sgd(animal.trained(model)), animal.loss_fn, **options)


WRONG = {
    "targets": (Animal(TiedHead, texts, mean_over_labels), "does not average over the targets"),
    "a sum as a mean": (Animal(TiedHead, texts, sum_over_labels), "it is a sum, declared as a mean"),
    "a mean as a sum": (Animal(mlp, regression, mean_square, reduction="sum"), "it is a mean, declared as a sum"),
    "not a sum over rows": (CONTRASTIVE, "the loss is not a sum over rows"),
}


@pytest.mark.parametrize("way", ["step", "updates"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_objective_raises_with_its_cause_each_time_and_leaves_no_trace(wrong, way):
    animal, cause = WRONG[wrong]
    model = animal.model()
    accumulator = accumulator_of(animal, model)
    batch = animal.batch(10, torch.float64)
    for _ in range(2):
        with assert_leaves_no_trace(model), pytest.raises(wb.VerifyError, match=cause) as error:
            accumulator.step(batch) if way == "step" else list(accumulator.updates([batch, batch], micro_batches=2))
        assert "off by" in error.value.found
        assert error.value.hint
        assert isinstance(error.value, AssertionError)


def test_a_mean_over_labels_by_hand_is_a_matter_of_targets_also_where_a_row_has_none():
    def masked_mean(model, batch):
        kept = batch["labels"] != IGNORED
        each = cross_entropy(model(batch["tokens"]).mT, batch["labels"], ignore_index=IGNORED, reduction="none")
        return each.sum() / kept.sum()

    animal = Animal(TiedHead, texts, masked_mean)
    accumulator = accumulator_of(animal, animal.model())
    with pytest.raises(wb.VerifyError, match="does not average over the targets"):
        accumulator.step(texts(10, torch.float64))


@pytest.mark.parametrize("wrong", WRONG)
def test_the_check_can_be_left_out(wrong):
    animal, _ = WRONG[wrong]
    accumulator = accumulator_of(animal, animal.model(), check=None)
    assert accumulator.step(animal.batch(10, torch.float64)).applied
    assert accumulator.reasons == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CALM)
def test_a_sound_model_passes_and_the_check_says_so(name, dtype):
    animal = CALM[name]
    accumulator = accumulator_of(animal, animal.model(dtype))
    assert accumulator.step(animal.batch(10, dtype)).applied
    (reason,) = accumulator.reasons
    assert "compared cut and uncut on 8 rows: equal to" in reason


def test_a_loss_that_draws_random_numbers_is_no_mistake():
    accumulator = accumulator_of(NOISY, NOISY.model())
    assert accumulator.step(NOISY.batch(10, torch.float64)).applied
    assert "random numbers" in accumulator.reasons[0]


@pytest.mark.parametrize("animal", [DROPOUT, BATCH_NORM, MIXED], ids=["dropout", "batch norm", "bfloat16"])
def test_what_is_random_or_wanted_or_coarse_is_no_mistake(animal):
    accumulator = accumulator_of(animal, animal.model(torch.float32), batch_norm="per_micro_batch")
    assert accumulator.step(animal.batch(10, torch.float32)).applied
    assert "compared cut and uncut" in accumulator.reasons[0]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_first_batch_is_compared_in_the_precision_in_which_it_trains(precision, dtype):
    """Inputs of 16 bits meet weights of 32 only under autocast."""
    animal = Animal(mlp, regression, lambda model, batch: mse_loss(model(batch["x"]).float(), batch["y"].float()))
    accumulator = accumulator_of(animal, animal.model(torch.float32), precision=precision)
    assert accumulator.step(regression(10, dtype)).applied
    assert "compared cut and uncut on 8 rows" in accumulator.reasons[0]


@pytest.mark.parametrize("way", ["step", "updates"])
def test_a_first_batch_that_is_not_finite_is_skipped_and_the_next_one_is_compared(way):
    animal = Animal(mlp, regression, mean_square)
    model = animal.model()
    accumulator = accumulator_of(animal, model)
    bad, good = animal.batch(10, torch.float64), animal.batch(10, torch.float64)
    bad["x"] = bad["x"] * torch.nan

    def update(batch):
        return (
            accumulator.step(batch)
            if way == "step"
            else next(iter(accumulator.updates([batch, batch], micro_batches=2)))
        )

    with assert_leaves_no_trace(model):
        assert update(bad).skipped == "the loss is nan"
    assert accumulator.reasons == []
    assert update(good).applied
    assert "compared cut and uncut" in accumulator.reasons[0]


def test_a_first_batch_that_is_not_finite_raises_where_that_is_wanted():
    animal = Animal(mlp, regression, mean_square)
    accumulator = accumulator_of(animal, animal.model(), on_nonfinite="raise")
    batch = animal.batch(10, torch.float64)
    batch["y"][3] = torch.inf
    with pytest.raises(wb.NonFiniteError, match="loss is inf"):
        accumulator.step(batch)


class MagnifiesRounding(nn.Module):
    """Normalises over two values of 16 bits, so that their rounding is much of what is seen."""

    def __init__(self):
        super().__init__()
        self.widen, self.narrow = nn.Linear(5, 2), nn.Linear(2, 3)

    def forward(self, x):
        wide = self.widen(x)
        return self.narrow((wide - wide.mean(1, keepdim=True)) / (wide.std(1, keepdim=True) + 1e-3))


@pytest.mark.parametrize("seed", range(4))
def test_rounding_that_autocast_makes_large_is_no_mistake(seed):
    torch.manual_seed(seed)
    model = MagnifiesRounding()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), mean_square, micro_batch=wb.Rows(4), precision="bf16")
    assert accumulator.step(regression(10, torch.float32)).applied
    assert "compared cut and uncut on 8 rows" in accumulator.reasons[0]


def test_a_mistake_is_seen_under_autocast_all_the_same():
    animal, cause = WRONG["targets"]
    accumulator = accumulator_of(animal, animal.model(torch.float32), precision="bf16")
    with pytest.raises(wb.VerifyError, match=cause):
        accumulator.step(animal.batch(10, torch.float32))


class SometimesSkips(nn.Module):
    """Leaves its second layer out once in a while, as LayerDrop does, by a draw of Python's."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 3), nn.Linear(3, 3)

    def forward(self, x):
        hidden = self.first(x)
        return hidden if random.random() < 0.2 else self.second(hidden)


@pytest.mark.parametrize("seed", range(8))
def test_a_rare_draw_is_told_from_a_mistake(seed):
    animal = Animal(SometimesSkips, regression, mean_square)
    random.seed(seed)
    accumulator = accumulator_of(animal, animal.model())
    assert accumulator.step(animal.batch(10, torch.float64)).applied


class Detector(nn.Module):
    """Returns losses in training mode, and something else in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, x):
        return {"loss": self.layers(x + torch.randn_like(x)).square().mean()} if self.training else {"boxes": x}


def test_a_model_that_returns_no_loss_in_evaluation_mode_is_not_compared_and_trains():
    animal = Animal(Detector, regression, lambda model, batch: model(batch["x"])["loss"])
    accumulator = accumulator_of(animal, animal.model())
    assert accumulator.step(regression(10, torch.float64)).applied
    assert "not compared" in accumulator.reasons[0]
    assert "KeyError" in accumulator.reasons[0]


def test_bfloat16_weights_are_compared_in_their_own_units():
    animal = CALM["convolution"]
    accumulator = accumulator_of(animal, animal.model(torch.bfloat16))
    assert accumulator.step(animal.batch(10, torch.bfloat16)).applied


@pytest.mark.parametrize("name", ["mlp", "changing buffer", "shared weights", "regulariser"])
def test_training_with_the_check_is_training_without_it(name):
    """Bitwise: random streams, buffers, gradients and modes are those of before."""

    def train(check):
        animal = CALM[name]
        model = nn.ModuleDict({"it": animal.model(), "dropout": nn.Dropout(0.3)})
        torch.manual_seed(5)
        accumulator = wb.Accumulator(
            model,
            sgd(model.parameters()),
            lambda m, b: (
                animal.loss_fn(lambda x: m["dropout"](m["it"](x)), b)
                if name != "regulariser"
                else animal.loss_fn(m["it"], b)
            ),
            targets=animal.targets,
            micro_batch=wb.Rows(3),
            check=check,
        )
        accumulator.step(animal.batch(8, torch.float64))
        return state_of(model)

    assert train("first") == train(None)


def test_the_first_batch_is_compared_and_no_other():
    calls = []

    def counting(model, batch):
        calls.append(len(batch["x"]))
        return mean_square(model, batch)

    accumulator = accumulator_of(Animal(mlp, regression, counting), mlp().double())
    for _ in range(3):
        accumulator.step(regression(8, torch.float64))
    assert len(calls) > 3 * 2
    assert calls[-4:] == [4, 4, 4, 4]


def test_a_batch_that_is_not_cut_is_not_compared():
    accumulator = accumulator_of(CALM["mlp"], CALM["mlp"].model(), micro_batch=wb.Rows(99))
    accumulator.step(regression(8, torch.float64))
    list(accumulator.updates([regression(8, torch.float64)], micro_batches=1))
    assert accumulator.reasons == []


def test_no_more_rows_are_run_together_than_fit():
    """A micro-batch of three rows fits, so no piece of the check has more."""
    most = []

    def counting(model, batch):
        most.append(len(batch["x"]))
        return mean_square(model, batch)

    accumulator = accumulator_of(Animal(mlp, regression, counting), mlp().double(), micro_batch=wb.Rows(3))
    accumulator.step(regression(20, torch.float64))
    assert max(most) == 3
    assert "on 8 rows" in accumulator.reasons[0]


def test_rows_by_length_are_compared_within_the_tokens_that_fit():
    rows = [torch.ones(length, 5, dtype=torch.float64) * length for length in (2, 40, 3, 5, 2, 4, 3, 30, 2)]
    padded = []

    def loss_fn(model, x):
        padded.append(x.shape[0] * x.shape[1])
        mask = x.abs().sum(2) > 0
        return (model(x).square().sum(2) * mask).sum(), mask.sum()

    def pad(some):
        return nn.utils.rnn.pad_sequence(some, batch_first=True)

    model = mlp().double()
    accumulator = wb.Accumulator(
        model, sgd(model.parameters()), loss_fn, micro_batch=wb.Tokens(12, length=len), collate=pad
    )
    assert accumulator.step(rows).applied
    assert max(padded) == 40
    assert "compared cut and uncut" in accumulator.reasons[0]


def test_rows_that_do_not_fit_together_are_not_compared_and_the_reason_is_said():
    accumulator = accumulator_of(CALM["mlp"], CALM["mlp"].model(), micro_batch=wb.Rows(1))
    assert accumulator.step(regression(8, torch.float64)).applied
    assert "no two of its rows are known to fit together" in accumulator.reasons[0]


def test_micro_batches_whose_rows_nobody_knows_are_not_compared_and_the_reason_is_said():
    odd = {**regression(4, torch.float64), "anchor": torch.ones(2)}
    model = mlp().double()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), mean_square, targets=lambda _: 4)
    list(accumulator.updates([odd, odd], micro_batches=2))
    assert "disagree on how many rows" in accumulator.reasons[0]


class Packed(nn.Module):
    """Texts that stand one after the other: each token attends to its own text and to what comes before it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11)

    def forward(self, tokens, text):
        seen = (text[:, None] == text) & torch.ones(len(text), len(text), dtype=torch.bool).tril()
        each = self.embed(tokens)
        scores = (each @ each.mT).masked_fill(~seen, -torch.inf)
        return self.head(scores.softmax(dim=1) @ each)


def packed(documents):
    numbers = [torch.full((len(text) - 1,), number) for number, text in enumerate(documents)]
    return {
        "tokens": torch.cat([text[:-1] for text in documents]),
        "text": torch.cat(numbers),
        "labels": torch.cat([text[1:] for text in documents]),
    }


def next_token(model, batch):
    logits = model(batch["tokens"], batch["text"])
    return cross_entropy(logits, batch["labels"], reduction="sum"), len(batch["labels"])


def test_packed_texts_of_a_loader_hold_no_rows_and_train_once_that_is_said():
    """Their tokens lie where rows usually do; taken for rows, they are refused with the argument that says so."""
    torch.manual_seed(0)
    documents = [torch.arange(length) * 3 % 11 for length in (4, 9, 3, 7, 5)]
    model = Packed().double()
    right = torch.autograd.grad(next_token(model, packed(documents))[0] / 23, model.parameters())
    loader = [packed(documents[:2]), packed(documents[2:])]
    accumulator = wb.Accumulator(model, sgd(model.parameters()), next_token)
    with pytest.raises(wb.VerifyError, match="not a sum over rows") as error:
        list(accumulator.updates(loader, micro_batches=2))
    assert "whole=" in error.value.hint
    before = [parameter.detach().clone() for parameter in model.parameters()]
    said = wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=1.0), next_token, whole=list(loader[0]))
    (update,) = said.updates(loader, micro_batches=2)
    assert (update.targets, update.rows) == (23, None)
    change = [old - new.detach() for old, new in zip(before, model.parameters(), strict=True)]
    assert relative_error(flat(change), flat(right)) <= 1e-12
    assert said.reasons == [
        "The first batch was not compared cut and uncut. The logical batch (dict) holds no tensor with rows."
    ]


def test_a_nested_tensor_of_a_loader_trains_as_it_is():
    torch.manual_seed(0)
    documents = [torch.arange(length) * 3 % 11 for length in (4, 9, 3, 7)]
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11)).double()

    def next_one(model, nested):
        return cross_entropy(model(nested).values(), (nested.values() + 3) % 11, reduction="sum"), len(nested.values())

    everything = torch.cat(documents)
    right = torch.autograd.grad(cross_entropy(model(everything), (everything + 3) % 11), model.parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    accumulator = wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=1.0), next_one)
    loader = [torch.nested.nested_tensor(part, layout=torch.jagged) for part in (documents[:3], documents[3:])]
    (update,) = accumulator.updates(loader, micro_batches=2)
    assert (update.rows, update.targets) == (4, 23)
    change = [old - new.detach() for old, new in zip(before, model.parameters(), strict=True)]
    assert relative_error(flat(change), flat(right)) <= 1e-12
    assert "is a nested tensor" in accumulator.reasons[0]


def test_a_first_micro_batch_of_one_row_leaves_the_check_to_the_next():
    accumulator = accumulator_of(CALM["mlp"], CALM["mlp"].model())
    parts = [regression(1, torch.float64), regression(4, torch.float64)]
    (update,) = accumulator.updates(parts, micro_batches=2)
    assert update.targets == 5
    assert "on 4 rows" in accumulator.reasons[0]


@pytest.mark.parametrize("nothing", ["masked", "none"])
def test_a_first_batch_without_a_target_has_nothing_to_compare(nothing):
    animal = CALM["shared weights"]
    batch = animal.batch(8, torch.float64)
    if nothing == "masked":
        batch["labels"] = torch.full_like(batch["labels"], -100)
    else:
        animal = Animal(TiedHead, texts, lambda *_: None)
    accumulator = accumulator_of(animal, animal.model())
    assert accumulator.step(batch).skipped


def test_an_exception_in_the_first_comparison_leaves_no_trace():
    def stumbling(model, batch):
        raise ArithmeticError

    model = BATCH_NORM.model()
    accumulator = accumulator_of(Animal(mlp, regression, stumbling), model, batch_norm="per_micro_batch")
    with assert_leaves_no_trace(model), pytest.raises(ArithmeticError):
        accumulator.step(regression(8, torch.float64))


def test_the_check_inside_an_open_window_leaves_its_gradient_alone():
    """In a stream the first micro-batch may have one row, and the check comes when a gradient is there already."""
    changes = []
    for check in ("first", None):
        model = CALM["mlp"].model()
        before = flat(model.parameters())
        accumulator = wb.Accumulator(model, sgd(model.parameters()), mean_square, check=check)
        list(accumulator.updates([regression(1, torch.float64), regression(5, torch.float64)], micro_batches=2))
        changes.append(flat(model.parameters()) - before)
    assert torch.equal(*changes)


def test_there_is_no_cause_where_nothing_is_wrong():
    animal = CALM["mlp"]
    rows = LogicalBatch(animal.batch(6, torch.float64))
    probe = Probe(animal.model(), Objective(animal.loss_fn, None, "mean"), rows)
    assert diagnose(probe, range(6), [range(2), range(2, 6)]) == []


def test_another_accumulators_open_window_is_left_alone_by_the_check():
    model = CALM["mlp"].model()
    two = [
        wb.Accumulator(model, sgd(part.parameters()), mean_square, micro_batch=wb.Rows(2))
        for part in (model[0], model[2])
    ]
    right = flat(torch.autograd.grad(mean_square(model, regression(4, torch.float64)), list(model[0].parameters())))
    window = two[0].window()
    window.backward(mean_square(model, regression(4, torch.float64)), targets=4)
    two[1].step(regression(6, torch.float64))
    before = flat(model[0].parameters())
    window.close()
    torch.testing.assert_close(before - flat(model[0].parameters()), right, rtol=1e-12, atol=1e-15)


class Upcasting(TiedHead):
    """Computes its logits in float32 whatever its weights are, as many language models do."""

    def forward(self, tokens):
        return super().forward(tokens).float()


def test_what_a_model_computes_in_fewer_digits_is_compared_in_those():
    model, batch = Animal(Upcasting, texts, mean_over_labels).model(), texts(10, torch.float64)
    right = Objective(mean_over_labels, lambda batch: (batch["labels"] != IGNORED).sum(), "mean")
    probe = Probe(model, right, LogicalBatch(batch))
    assert diagnose(probe, range(10), [range(3), range(3, 10)]) == []


def test_the_wider_bound_sees_wrong_targets():
    model, batch = Animal(Upcasting, texts, mean_over_labels).model(), texts(10, torch.float64)
    probe = Probe(model, Objective(mean_over_labels, None, "mean"), LogicalBatch(batch))
    (cause,) = diagnose(probe, range(10), [range(3), range(3, 10)])
    assert cause.name == "targets"


def test_a_steep_loss_in_float64_is_rounding():
    """At a temperature of 1e-4 the gradient is the difference of large numbers, ten thousand times as rough."""
    animal = Animal(mlp, regression, lambda model, batch: cross_entropy(model(batch["x"]) / 1e-4, batch["y"].argmax(1)))
    accumulator = accumulator_of(animal, animal.model())
    assert accumulator.step(animal.batch(64, torch.float64)).applied


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e18, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_norm_is_right_where_squares_are_beyond_the_dtype(dtype, size):
    entries = torch.full((10_000,), size, dtype=dtype)
    assert norm(entries) == pytest.approx(100 * size, rel=1e-5)


def test_the_bound_sees_a_norm_that_adds_up_in_32_bits():
    assert float(torch.linalg.vector_norm(torch.full((10_000,), 1e-30))) == 0
    assert float(torch.linalg.vector_norm(torch.full((10_000,), 1e30))) == float("inf")


def test_a_flat_gradient_is_as_wide_as_the_widest_and_a_copy():
    narrow, complex_one = nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), nn.Parameter(torch.ones(1) * 1j)
    narrow.grad, complex_one.grad = torch.full((2,), 3.0, dtype=torch.bfloat16), torch.full((1,), 1 + 2j)
    flat = flat_gradient([narrow, complex_one])
    assert flat.dtype == torch.float32
    assert flat.tolist() == [3, 3, 1, 2]
    wide = nn.Parameter(torch.ones(1, dtype=torch.float64))
    assert flat_gradient([narrow, wide]).tolist() == [3, 3, 0]
    assert flat_gradient([narrow, wide]).dtype == torch.float64
    alone = nn.Parameter(torch.ones(2))
    alone.grad = torch.ones(2)
    kept = flat_gradient([alone])
    alone.grad.zero_()
    assert kept.tolist() == [1, 1]


def test_gradients_are_taken_as_they_are():
    narrow, sparse = nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), nn.Parameter(torch.ones(2, 2))
    complex_one, without = (nn.Parameter(torch.ones(1, 2) * 1j) for _ in range(2))
    narrow.grad, complex_one.grad = torch.full((2,), 3.0, dtype=torch.bfloat16), torch.full((1, 2), 1 + 2j)
    sparse.grad = torch.sparse_coo_tensor([[1]], [[4.0, 5.0]], (2, 2), check_invariants=True)
    held = narrow.grad
    taken = take_gradients([narrow, sparse, complex_one, without])
    assert [each.tolist() for each in taken] == [[3, 3], [0, 0, 4, 5], [1, 2, 1, 2], [0, 0, 0, 0]]
    assert not any(each.is_complex() for each in taken)
    assert taken[0].data_ptr() == held.data_ptr()
    assert all(parameter.grad is None for parameter in (narrow, sparse, complex_one, without))


def test_a_gradient_that_is_a_view_is_copied_when_it_is_taken():
    """As in DistributedDataParallel with `gradient_as_bucket_view`, whose next backward pass writes there again."""
    bucket, parameter = torch.ones(4), nn.Parameter(torch.ones(2))
    parameter.grad = bucket[:2]
    (taken,) = take_gradients([parameter])
    bucket.zero_()
    assert taken.tolist() == [1, 1]


class OwnBatchNorm(nn.Module):
    """Standardises by the rows that it sees in training mode, and by fixed numbers in evaluation."""

    def __init__(self, drop):
        super().__init__()
        self.first, self.last, self.drop = nn.Linear(5, 7), nn.Linear(7, 3), drop

    def forward(self, x):
        hidden = self.drop(self.first(x), self.training)
        if self.training:
            hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()
        return self.last(hidden)


@pytest.mark.parametrize("way", ["first", "verify"])
@pytest.mark.parametrize("drops", ["nothing", "by a function", "inside of attention"])
def test_a_layer_that_looks_at_the_batch_in_training_mode_alone_is_seen_whatever_drops(drops, way):
    def attend(x, training):
        rows = x.reshape(len(x), 1, -1)
        return nn.functional.scaled_dot_product_attention(rows, rows, rows, None, 0.5 * training).flatten(1)

    drop = {
        "nothing": lambda x, _: x,
        "by a function": lambda x, training: nn.functional.dropout(x, 0.5, training),
        "inside of attention": attend,
    }[drops]
    animal = Animal(lambda: OwnBatchNorm(drop), regression, mean_square)
    batch = regression(12, torch.float64)
    if way == "first":
        accumulator = accumulator_of(animal, animal.model())
        with pytest.raises(wb.VerifyError, match="depends on which rows are together"):
            accumulator.step(batch)
    else:
        assert wb.verify(animal.model(), mean_square, batch).causes[0].name == "balancing loss"


def test_the_mask_of_self_attention_is_silent_too():
    attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True).double()
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    with silenced(attention):
        assert torch.equal(attention(x, x, x, need_weights=False)[0], attention(x, x, x, need_weights=False)[0])
    assert not torch.equal(attention(x, x, x, need_weights=False)[0], attention(x, x, x, need_weights=False)[0])


def test_a_gradient_taken_inside_the_loss_through_exact_batch_norm_is_refused():
    def penalised(model, batch):
        x = batch["x"].clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return mean_square(model, batch) + slope.square().sum(1).mean()

    animal = Animal(lambda: wb.exact_batch_norm(BATCH_NORM.build()), regression, penalised)
    with pytest.raises(wb.VerifyError, match="The micro-batches meet, and still"):
        accumulator_of(animal, animal.model()).step(regression(10, torch.float64))


def normalised_by_a_function(model, batch):
    return mse_loss(nn.functional.batch_norm(model(batch["x"]), None, None, training=True), batch["y"])


def test_batch_norm_that_is_no_layer_is_refused_with_a_hint():
    animal = Animal(mlp, regression, normalised_by_a_function)
    with pytest.raises(wb.BatchNormError, match="no layer of this model") as error:
        accumulator_of(animal, animal.model()).step(regression(12, torch.float64))
    assert "teacher.eval()" in error.value.hint


def test_a_graph_of_all_micro_batches_that_the_loss_uses_up_is_refused():
    def attacked(model, batch):
        x = batch["x"].clone().requires_grad_()
        (slope,) = torch.autograd.grad(mse_loss(model(x), batch["y"]), x)
        return mse_loss(model(batch["x"] + 0.1 * slope.sign()), batch["y"])

    animal = Animal(lambda: wb.exact_batch_norm(BATCH_NORM.build()), regression, attacked)
    for options in {}, {"check": None}:
        with pytest.raises(wb.MeetingError, match="A gradient is taken inside the loss") as error:
            accumulator_of(animal, animal.model(), **options).step(regression(10, torch.float64))
        assert "wb.gather(y).sum()" in error.value.hint


class CarriesOver(nn.Module):
    """Subtracts a moving mean, which every pass in training mode moves."""

    def __init__(self, reads, where="buffer"):
        super().__init__()
        self.layers, self.reads, self.drop, self.dims = mlp(), reads, nn.Dropout(0.3), (0,)
        if where == "buffer":
            self.register_buffer("centre", torch.zeros(3))
        else:
            self.centre = torch.zeros(3, dtype=torch.float64)

    def forward(self, x):
        out = self.layers(self.drop(x))
        moved = out - self.centre if self.reads else out
        if self.training:
            self.centre = torch.lerp(self.centre, out.detach().mean(0), 0.5)
        return moved


class Follows(nn.Module):
    """Two encoders, of which one does not learn: it follows the other a little in every forward pass."""

    def __init__(self, how):
        super().__init__()
        self.student, self.teacher, self.how = nn.Linear(5, 3), nn.Linear(5, 3).requires_grad_(False), how

    def forward(self, x):
        for mine, own in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            if self.how == "in place":
                mine.lerp_(own.detach(), 0.1)
            elif self.how == "anew":
                mine.data = 0.9 * mine.data + 0.1 * own.data
            else:
                mine.data.lerp_(own.data, 0.1)
        return self.student(x) - self.teacher(x)


@pytest.mark.parametrize("way", ["first", "verify"])
@pytest.mark.parametrize("how", ["in place", "anew", "unseen"])
def test_a_weight_that_follows_in_every_pass_is_named(how, way):
    batch = regression(12, torch.float64)
    if way == "verify":
        (cause,) = wb.verify(Follows(how).double(), mean_square, batch).causes
        assert (cause.name, "teacher.weight" in cause.found) == ("carried over", True)
        return
    animal = Animal(lambda: Follows(how), regression, mean_square)
    with pytest.raises(wb.VerifyError, match=r"every forward pass changes in the model .teacher\.weight"):
        accumulator_of(animal, animal.model()).step(batch)


class Codebook(nn.Module):
    """Reads a buffer, and moves it by what all micro-batches bring, once."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(5, 4), nn.Linear(4, 3)
        self.register_buffer("centre", torch.linspace(-1, 1, 4))

    def forward(self, x):
        code = self.encode(x)
        read = code * self.centre.clone()
        mean = wb.sum_over_batch(code.detach().sum(0)) / wb.sum_over_batch(len(x))
        if self.training and 0 in wb.own_rows(x):
            self.centre.lerp_(mean, 0.5)
        return self.decode(read)


@pytest.mark.parametrize("lockstep", ["replay", "joined"])
def test_what_all_move_once_and_read_before_is_not_refused(lockstep):
    """Also where what is brought is detached, and what comes back is not, since the first pass of a replay needs it."""
    animal = Animal(Codebook, regression, mean_square)
    batch = regression(12, torch.float64)
    assert wb.verify(animal.model(), mean_square, batch).ok
    whole, cut = animal.model(), animal.model()
    undivided(animal)(whole, sgd(whole.parameters()), batch)
    accumulator_of(animal, cut, lockstep=lockstep).step(batch)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(cut.state_dict()[name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", ["first", "verify"])
@pytest.mark.parametrize("where", ["buffer", "attribute"])
def test_what_the_loss_reads_and_every_pass_moves_is_named(where, way):
    animal = Animal(lambda: CarriesOver(True, where), regression, mean_square)
    model, batch = animal.model(), regression(12, torch.float64)
    if way == "first":
        with (
            assert_leaves_no_trace(model),
            pytest.raises(wb.VerifyError, match=r"forward pass changes in the model \(centre\)"),
        ):
            accumulator_of(animal, model).step(batch)
    else:
        (cause,) = wb.verify(model, mean_square, batch).causes
        assert (cause.name, cause.layers) == ("carried over", ("centre",))


class WarmsUp(nn.Module):
    """Counts its passes in a plain number or tensor, by which it scales what comes out."""

    def __init__(self, passes):
        super().__init__()
        self.layers, self.passes = mlp(), passes

    def forward(self, x):
        self.passes += self.training
        return self.layers(x) * (1 - 0.5**self.passes)


@pytest.mark.parametrize("passes", [0, torch.tensor(0)], ids=["number", "tensor"])
def test_what_counts_passes_is_named(passes):
    animal = Animal(lambda: WarmsUp(passes), regression, mean_square)
    model = animal.model()
    with pytest.raises(wb.VerifyError, match=r"changes in the model \(passes\)"):
        accumulator_of(animal, model).step(regression(12, torch.float64))


def test_a_buffer_that_the_loss_does_not_read_may_move():
    animal = Animal(lambda: CarriesOver(reads=False), regression, mean_square)
    accumulator = accumulator_of(animal, animal.model())
    assert accumulator.step(regression(12, torch.float64)).applied
    assert "equal to" in accumulator.reasons[0]


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm], ids=["old", "new"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`|`torch.nn.utils.spectral_norm`")
def test_spectral_norm_is_no_mistake(norm):
    torch.manual_seed(0)
    animal = Animal(
        lambda: nn.Sequential(norm(nn.Linear(5, 7)), nn.Tanh(), norm(nn.Linear(7, 3))), regression, mean_square
    )
    accumulator = accumulator_of(animal, animal.model())
    assert accumulator.step(regression(12, torch.float64)).applied
    assert "in evaluation mode" in accumulator.reasons[0]


@pytest.mark.parametrize("way", ["first", "verify"])
def test_weights_that_every_pass_moves_are_named(way):
    def decayed(model, batch):
        with torch.no_grad():
            model[0].weight.mul_(0.9)
        return mean_square(model, batch)

    animal, batch = Animal(mlp, regression, decayed), regression(12, torch.float64)
    if way == "first":
        with pytest.raises(wb.VerifyError, match=r"changes in the model \(0.weight\)"):
            accumulator_of(animal, animal.model()).step(batch)
    else:
        assert wb.verify(animal.model(), decayed, batch).causes[0].name == "carried over"


def test_weights_that_a_pass_puts_into_their_bounds_are_no_mistake():
    def bounded(model, batch):
        with torch.no_grad():
            model[0].weight.clamp_(-0.1, 0.1)
        return mean_square(model, batch)

    animal = Animal(mlp, regression, bounded)
    accumulator = accumulator_of(animal, animal.model())
    assert accumulator.step(regression(12, torch.float64)).applied


class TakesFourRows(nn.Module):
    """As a model does whose first state, or whose compiled graph, is made for one number of rows."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x):
        if len(x) != 4:
            raise RuntimeError(f"expected 4 rows, got {len(x)}")
        return self.layer(x)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_model_that_takes_one_number_of_rows_is_trained_and_not_compared(loaded, caplog):
    torch.manual_seed(0)
    model = TakesFourRows().double()
    right = copy.deepcopy(model.layer)
    data = torch.randn(12, 3, dtype=torch.float64)
    accumulator = wb.Accumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model, x: model(x).square().mean(),
        micro_batch=wb.Rows(4),
    )
    if loaded:
        assert [update.rows for update in accumulator.updates(data.split(4), micro_batches=3)] == [12]
    else:
        assert accumulator.step(data).micro_batches == 3
    assert "the loss raises RuntimeError: expected 4 rows, got 2" in accumulator.reasons[0]
    assert [each.getMessage() for each in caplog.records if each.levelname == "WARNING"] == [accumulator.reasons[0]]
    right(data).square().mean().backward()
    with torch.no_grad():
        right.weight -= 0.1 * right.weight.grad
    torch.testing.assert_close(model.layer.weight, right.weight, rtol=1e-12, atol=1e-12)


def test_what_the_loss_raises_in_the_comparison_is_raised_by_training_too():
    model = TakesFourRows().double()
    accumulator = wb.Accumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model, x: model(x).square().mean(),
        micro_batch=wb.Rows(5),
    )
    with pytest.raises(RuntimeError, match="expected 4 rows, got 5"):
        accumulator.step(torch.randn(12, 3, dtype=torch.float64))


def test_a_first_batch_that_is_not_finite_is_no_mistake_where_micro_batches_meet():
    model = nn.Linear(3, 2).double()
    accumulator = wb.Accumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model, x: wb.losses.info_nce(model(x), x[:, :2]),
        micro_batch=wb.Rows(4),
    )
    x = torch.randn(10, 3, dtype=torch.float64)
    assert accumulator.step(torch.full_like(x, torch.nan)).skipped == "the loss is nan"
    assert accumulator.step(x).applied
    assert "equal" in accumulator.reasons[-1]


def test_a_loss_that_takes_two_rows_at_least_is_compared_in_halves():
    def spread(model, x):
        if len(x) < 2:
            raise ValueError("two rows at least")
        return model(x).std(0).sum()

    model = nn.Linear(3, 2).double()
    accumulator = wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), spread, micro_batch=wb.Rows(6))
    with pytest.raises(wb.VerifyError, match="not a sum over rows"):
        accumulator.step(torch.randn(12, 3, dtype=torch.float64))
