"""A head whose logits never exist as a whole is the plain head, in less memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import wholebatch as wb
from wholebatch.engine.losses import linear_cross_entropy
from wholebatch.engine.memory import tensor_peak

CLASSES, WIDTH = 50, 8


def problem(dtype=torch.float64, classes=CLASSES, positions=(3, 11), width=WIDTH):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(*positions, width, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(classes, width, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(classes, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(classes, positions, generator=draw)
    labels[..., ::3] = -100
    return hidden, weight, bias, labels


def plain(hidden, weight, bias, labels, reduction):
    return functional.cross_entropy(
        functional.linear(hidden, weight, bias).flatten(0, -2), labels.flatten(), reduction=reduction
    )


def relative(found, right):
    found, right = found.detach().double(), right.detach().double()
    return float((found - right).norm() / right.norm())


@pytest.mark.parametrize("chunk", ["auto", 1, 4, 33, 1000])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_loss_and_gradients_are_those_of_the_plain_head(chunk, reduction, with_bias):
    hidden, weight, bias, labels = problem()
    inputs = [hidden, weight, *([bias] if with_bias else [])]
    right = plain(hidden, weight, bias if with_bias else None, labels, reduction)
    due = torch.autograd.grad(3 * right, inputs)
    loss = linear_cross_entropy(
        hidden, weight, labels, bias=bias if with_bias else None, reduction=reduction, chunk=chunk
    )
    found = torch.autograd.grad(3 * loss, inputs)
    assert relative(loss, right) <= 1e-14
    assert all(relative(one, other) <= 1e-14 for one, other in zip(found, due, strict=True))


def test_a_label_that_is_taken_for_another_is_seen():
    """The bound above sees one wrong label of 22."""
    hidden, weight, _, labels = problem()
    right = plain(hidden, weight, None, labels, "sum")
    labels[0, 1] = (labels[0, 1] + 1) % CLASSES
    assert relative(linear_cross_entropy(hidden, weight, labels, reduction="sum"), right) > 1e-4


def test_in_16_bits_the_sums_are_kept_in_32():
    """4,096 positions: the plain sum in bfloat16 is the judge of nothing, so float64 is."""
    hidden, weight, _, labels = problem(torch.bfloat16, positions=(4096,))
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    right = plain(*exact, None, labels, "sum")
    due = torch.autograd.grad(right, exact)
    loss = linear_cross_entropy(hidden, weight, labels, reduction="sum", chunk=16)
    found = torch.autograd.grad(loss, [hidden, weight])
    assert loss.dtype == torch.float32
    assert relative(loss, right) <= torch.finfo(torch.bfloat16).eps / 4
    assert all(relative(one, other) <= torch.finfo(torch.bfloat16).eps for one, other in zip(found, due, strict=True))


def test_under_autocast_it_is_the_plain_head_under_autocast():
    hidden, weight, bias, labels = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        right = plain(hidden, weight, bias, labels, "mean")
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias)
    due = torch.autograd.grad(right, [hidden, weight, bias])
    found = torch.autograd.grad(loss, [hidden, weight, bias])
    assert relative(loss, right) <= torch.finfo(torch.bfloat16).eps
    assert all(one.dtype == other.dtype for one, other in zip(found, due, strict=True))
    assert all(relative(one, other) <= 2e-2 for one, other in zip(found, due, strict=True))


def test_the_logits_never_exist_as_a_whole():
    """2,048 positions and 4,096 classes: the plain head holds the logits three times, 96 MiB of float32."""
    peaks = {}
    for name, head in (("plain", plain), ("chunked", None)):
        hidden, weight, _, labels = problem(torch.float32, classes=4096, positions=(2048,), width=32)
        with tensor_peak() as peak:
            loss = head(hidden, weight, None, labels, "mean") if head else linear_cross_entropy(hidden, weight, labels)
            loss.backward()
        peaks[name] = peak.peak_bytes
    assert peaks["plain"] >= 3 * 2048 * 4096 * 4
    assert peaks["chunked"] <= peaks["plain"] / 20


def test_what_is_frozen_gets_no_gradient_and_evaluation_computes_none():
    hidden, weight, _, labels = problem()
    (only,) = torch.autograd.grad(linear_cross_entropy(hidden.detach(), weight, labels), [weight])
    assert relative(only, torch.autograd.grad(plain(hidden, weight, None, labels, "mean"), [weight])[0]) <= 1e-14
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad


def test_it_can_be_cut():
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Embedding(20, 8), "head": nn.Linear(8, 20, bias=False)}).double()
    tokens = torch.randint(20, (12, 9))
    labels = tokens.roll(-1, dims=1).where(torch.rand(12, 9) < 0.6, -100)

    def loss_fn(model, batch):
        hidden = torch.tanh(model["body"](batch["tokens"]))
        loss = linear_cross_entropy(hidden, model["head"].weight, batch["labels"], reduction="sum")
        return loss, (batch["labels"] != -100).sum()

    verification = wb.verify(model, loss_fn, {"tokens": tokens, "labels": labels})
    assert verification.ok, verification
    assert verification.error < 1e-14


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"labels": torch.zeros(3, dtype=torch.long)}, "do not fit"),
        ({"weight": torch.zeros(CLASSES, WIDTH + 1)}, "do not fit"),
        ({"chunk": 0}, "chunk of 0 positions"),
        ({"chunk": "all"}, "chunk='all'"),
        ({"chunk": 2.5}, "chunk=2.5"),
        ({"bias": torch.zeros(CLASSES + 1)}, "bias"),
        ({"bias": torch.zeros(CLASSES, dtype=torch.bfloat16)}, "bias torch.bfloat16"),
        ({"weight": nn.Linear(WIDTH, CLASSES)}, "weight is a Linear"),
        ({"labels": [0, 1]}, "labels is a list"),
        ({"ignore_index": None}, "ignore_index=None"),
    ],
)
def test_what_does_not_fit_is_named(change, found):
    hidden, weight, _, labels = problem()
    with pytest.raises(wb.LossError, match=found):
        linear_cross_entropy(**{"hidden": hidden, "weight": weight, "labels": labels, **change})


@pytest.mark.parametrize(
    ("labels", "options", "found"),
    [
        (torch.tensor([0, -1, 2]), {}, "A label is -1, and classes are 0 to 49; ignore_index is -100"),
        (torch.tensor([0, 50, 2]), {}, "A label is 50"),
        (torch.zeros(3), {}, "Labels are torch.float32"),
        (torch.zeros(3, dtype=torch.int64), {"reduction": "none"}, "reduction='none'"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, options, found):
    with pytest.raises(wb.LossError, match=found):
        linear_cross_entropy(torch.randn(3, WIDTH), torch.randn(CLASSES, WIDTH), labels, **options)


@pytest.mark.parametrize("ignored", [-1, 0])
def test_any_label_may_mark_what_is_not_learned(ignored):
    hidden, weight, bias, labels = problem()
    labels = labels.masked_fill(labels == -100, ignored)
    found = linear_cross_entropy(hidden, weight, labels, bias=bias, ignore_index=ignored)
    logits = functional.linear(hidden, weight, bias).flatten(0, -2)
    torch.testing.assert_close(found, functional.cross_entropy(logits, labels.flatten(), ignore_index=ignored))


def test_a_single_position_is_learned():
    hidden, weight, _, labels = problem()
    one = hidden.flatten(0, -2)[0]
    label = labels.flatten().clamp(min=0)[0]
    assert torch.allclose(linear_cross_entropy(one, weight, label), nn.functional.cross_entropy(weight @ one, label))
