"""The update of the cut batch is that of the whole: over menagerie, cuts, reductions, optimizers and dtypes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import mse_loss

import wholebatch as wb
from menagerie import (
    CALM,
    IGNORED,
    MIXED,
    Animal,
    TiedHead,
    counted_sum,
    mean_over_labels,
    mlp,
    num_labels,
    numbers,
    regularised_sum,
    sum_over_labels,
    whole_numbers,
)
from properties import (
    assert_invariant_to_order,
    assert_invariant_to_the_cut,
    assert_linear_in_the_loss,
    change,
    gradient_of,
    parts,
    relative_error,
    stepped,
    undivided,
    updated,
    windowed,
)

FP64, FP32 = 1e-12, 1e-6
CUT = (4, 1, 6)

LENGTHS = st.lists(st.integers(0, 9), min_size=2, max_size=14).filter(any)
SUMS = {"mean": mean_over_labels, "sum": sum_over_labels, "pair": counted_sum, "pair with once": regularised_sum}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-6),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2, eps=1e-6),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Muon": lambda p: torch.optim.Muon([weight for weight in p if weight.ndim == 2], lr=1e-2),
}


def every_way(animal):
    cut = [stepped(animal, wb.Rows(3)), updated(animal, CUT), windowed(animal, CUT), windowed(animal, CUT, known=True)]
    return [*cut, stepped(animal, wb.Rows(1)), stepped(animal, wb.Rows(99))]


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, FP64), (torch.float32, FP32)], ids=str)
@pytest.mark.parametrize("name", CALM)
def test_the_update_of_every_model_is_invariant_to_the_cut(name, dtype, within):
    animal = CALM[name]
    assert_invariant_to_the_cut(animal, every_way(animal), sum(CUT), dtype=dtype, within=within)


@pytest.mark.parametrize("name", CALM)
def test_the_update_of_every_model_is_invariant_to_the_order_of_rows(name):
    order = torch.randperm(9).tolist()
    assert_invariant_to_order(CALM[name], stepped(CALM[name], wb.Rows(2)), 9, order)


@pytest.mark.parametrize("name", CALM)
def test_the_update_of_every_model_is_linear_in_the_loss(name):
    assert_linear_in_the_loss(CALM[name], lambda animal: stepped(animal, wb.Rows(4)), 9, factor=3.0)


def ragged(lengths, reduction):
    """Texts with so many labels each, and a loss over them that is declared in one of four ways."""
    tokens = whole_numbers(11, len(lengths), 9)
    kept = torch.arange(9)[None, :] < torch.tensor(lengths)[:, None]
    batch = {"tokens": tokens, "labels": tokens.roll(1, 1).masked_fill(~kept, IGNORED)}
    counted = reduction.startswith("pair")
    animal = Animal(
        TiedHead,
        lambda *_: batch,
        SUMS[reduction],
        None if counted else num_labels,
        "mean" if counted else reduction,
    )
    return animal, batch


def label_length(row):
    return int((row["labels"] != IGNORED).sum())


@settings(max_examples=60)
@given(
    lengths=LENGTHS,
    reduction=st.sampled_from(list(SUMS)),
    micro_batch=st.one_of(
        st.builds(wb.Rows, st.integers(1, 6)), st.builds(wb.Tokens, st.integers(1, 30), length=st.just(label_length))
    ),
    single=st.booleans(),
)
def test_step_is_exact_for_any_lengths_cut_and_reduction(lengths, reduction, micro_batch, single):
    animal, batch = ragged(lengths, reduction)
    dtype, within = (torch.float32, FP32) if single else (torch.float64, FP64)
    right = gradient_of(animal, undivided(animal), batch, dtype=dtype)
    assert relative_error(gradient_of(animal, stepped(animal, micro_batch), batch, dtype=dtype), right) <= within


@settings(max_examples=40)
@given(data=st.data(), lengths=LENGTHS, reduction=st.sampled_from(list(SUMS)), known=st.booleans())
def test_windows_and_updates_are_exact_for_any_cut(data, lengths, reduction, known):
    """Early scaling (the targets are known) and late scaling (they are not) give the same update."""
    animal, batch = ragged(lengths, reduction)
    places = sorted(data.draw(st.sets(st.integers(1, len(lengths) - 1), max_size=6)))
    cut = [stop - start for start, stop in zip([0, *places], [*places, len(lengths)], strict=True)]
    right = change(animal, undivided(animal), [batch])
    assert relative_error(change(animal, windowed(animal, cut, known=known), [batch]), right) <= FP64
    assert relative_error(change(animal, updated(animal, cut), [batch]), right) <= FP64


def mean_of_means(animal, cut):
    """The mistake: every micro-batch counts alike."""

    def make(model, optimizer, batch):
        optimizer.zero_grad()
        for part, _ in parts(animal, batch, cut):
            (animal.loss_fn(model, part) / len(cut)).backward()
        optimizer.step()

    return make


def without_the_last(animal, cut):
    """The mistake: the last micro-batch is dropped."""

    def make(model, optimizer, batch):
        kept = {name: tensor[: sum(cut[:-1])] for name, tensor in batch.items()}
        return windowed(animal, cut[:-1])(model, optimizer, kept)

    return make


@pytest.mark.parametrize("mistake", [mean_of_means, without_the_last])
def test_the_bound_sees_a_mean_of_means_and_a_dropped_micro_batch(mistake):
    animal, batch = ragged([5, 1, 3, 2, 7, 4], "mean")
    right = change(animal, undivided(animal), [batch])
    assert relative_error(change(animal, windowed(animal, (3, 1, 2)), [batch]), right) <= FP64
    assert relative_error(change(animal, mistake(animal, (3, 1, 2)), [batch]), right) > 1e10 * FP64


def test_the_bound_sees_a_regulariser_that_is_counted_in_every_micro_batch():
    animal, batch = ragged([5, 1, 3, 2], "pair with once")

    def inside_the_sum(model, part):
        loss, targets, once = regularised_sum(model, part)
        return loss + targets * once * 2, targets

    right = change(animal, undivided(animal), [batch])
    wrong = Animal(**{**vars(animal), "loss_fn": inside_the_sum})
    assert relative_error(change(animal, stepped(animal, wb.Rows(2)), [batch]), right) <= FP64
    assert relative_error(change(wrong, stepped(wrong, wb.Rows(2)), [batch]), right) > 1e-2


@settings(max_examples=25)
@given(
    lengths=st.lists(LENGTHS, min_size=3, max_size=3),
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    rows=st.integers(1, 5),
)
def test_three_updates_are_exact_with_every_optimizer(lengths, optimizer, rows):
    animal, _ = ragged(lengths[0], "mean")
    batches = [ragged(each, "mean")[1] for each in lengths]
    found = change(animal, stepped(animal, wb.Rows(rows)), batches, optimizer=OPTIMIZERS[optimizer])
    right = change(animal, undivided(animal), batches, optimizer=OPTIMIZERS[optimizer])
    assert relative_error(found, right) <= FP64


@pytest.mark.parametrize("rows", [(8,), (4, 4), (5, 3), (1,) * 8], ids=str)
def test_weights_of_two_dtypes_learn_together(rows):
    """16-bit and wider weights in one model: 4 eps of the coarser ones."""
    batch = MIXED.batch(8, torch.float32)
    right = gradient_of(MIXED, undivided(MIXED), batch, dtype=torch.float32)
    found = gradient_of(MIXED, windowed(MIXED, rows), batch, dtype=torch.float32)
    assert relative_error(found, right) <= 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("clip_norm", [0.01, 0.1, 100.0])
def test_clipping_is_that_of_the_whole_batch(clip_norm):
    animal = CALM["mlp"]
    batch = animal.batch(9, torch.float64)
    right = change(animal, undivided(animal, clip_norm=clip_norm), [batch])
    for way in (stepped(animal, wb.Rows(2), clip_norm=clip_norm), windowed(animal, (5, 4), clip_norm=clip_norm)):
        assert relative_error(change(animal, way, [batch]), right) <= FP64


def test_the_bound_sees_clipping_of_partial_sums():
    animal = CALM["mlp"]
    batch = animal.batch(9, torch.float64)

    def clips_parts(model, optimizer, batch):
        optimizer.zero_grad()
        for part, rows in parts(animal, batch, (2, 2, 5)):
            (animal.loss_fn(model, part) * rows / 9).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()

    right = change(animal, undivided(animal, clip_norm=0.01), [batch])
    assert relative_error(change(animal, clips_parts, [batch]), right) > 1e-2


def test_summed_sample_weights_are_targets_too():
    batch = {"x": numbers(9, 5), "y": numbers(9, 3, seed=1), "weight": numbers(9, seed=2).abs()}

    def weighted(model, part):
        return (part["weight"] * mse_loss(model(part["x"]), part["y"], reduction="none").mean(1)).sum()

    animal = Animal(mlp, lambda *_: batch, weighted, lambda part: part["weight"].sum(), "sum")
    right = change(animal, undivided(animal), [batch])
    for way in (stepped(animal, wb.Rows(2)), windowed(animal, (4, 5)), updated(animal, (1, 3, 5))):
        assert relative_error(change(animal, way, [batch]), right) <= FP64
