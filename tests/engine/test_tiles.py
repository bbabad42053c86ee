"""Similarities that are computed tile by tile, and again in the backward pass, give the loss of the whole matrix."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from wholebatch.engine.losses.tiles import told_apart
from wholebatch.engine.memory import tensor_peak

ROWS, WIDTH = 11, 5


def problem(candidates: int = ROWS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    anchors = torch.randn(ROWS, WIDTH, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    others = torch.randn(candidates, WIDTH, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    return anchors, others, torch.arange(ROWS)


def plain(anchors: Tensor, candidates: Tensor, own: Tensor, both_ways: bool) -> Tensor:
    similar = anchors @ candidates.T
    each = functional.cross_entropy(similar, own, reduction="none")
    if both_ways:
        each = (each + functional.cross_entropy(similar[:, : len(anchors)].T, own, reduction="none")) / 2
    return each


def relative(found: Tensor, right: Tensor) -> float:
    found, right = found.detach().double(), right.detach().double()
    return float((found - right).norm() / right.norm())


def told(anchors: Tensor, candidates: Tensor, own: Tensor, both_ways: bool, tile: int | None) -> Tensor:
    return told_apart(anchors, candidates, own, both_ways=both_ways, tile=tile, multiply_in=anchors.dtype)


@pytest.mark.parametrize("tile", [1, 4, ROWS, 1000, None])
@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("candidates", [ROWS, 3 * ROWS])
def test_loss_and_gradients_of_each_row_are_those_of_the_whole_matrix(tile, both_ways, candidates):
    inputs = problem(candidates)
    weights = torch.arange(1.0, ROWS + 1, dtype=torch.float64)
    right, found = plain(*inputs, both_ways), told(*inputs, both_ways, tile)
    assert relative(found, right) <= 1e-14
    due, got = (torch.autograd.grad(loss @ weights, inputs[:2]) for loss in (right, found))
    assert all(relative(one, other) <= 1e-14 for one, other in zip(got, due, strict=True))


def test_a_row_whose_own_candidate_is_another_is_seen():
    """The bound above sees one wrong place of eleven."""
    anchors, candidates, own = problem()
    assert relative(told(anchors, candidates, own.roll(1), False, 4), plain(anchors, candidates, own, False)) > 1e-2


def test_own_candidates_stand_anywhere_if_it_goes_one_way():
    anchors, candidates, _ = problem(30)
    own = torch.arange(ROWS) * 2 + 7
    assert relative(told(anchors, candidates, own, False, 4), plain(anchors, candidates, own, False)) <= 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_16_bits_are_summed_in_32(dtype):
    anchors, candidates, own = problem(dtype=torch.float32)
    exact = [each.detach().double().requires_grad_() for each in (anchors, candidates)]
    right = plain(*exact, own, True).mean()
    found = told_apart(anchors, candidates, own, both_ways=True, tile=4, multiply_in=dtype).mean()
    assert found.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    assert relative(found, right) <= eps
    scale = 2.0**20  # a loss scale with which fp16 would leave its range
    due = torch.autograd.grad(right * scale, exact)
    got = torch.autograd.grad(found * scale, [anchors, candidates])
    assert all(relative(one, other) <= 4 * eps for one, other in zip(got, due, strict=True))


def test_the_matrix_never_exists_whole():
    """2,048 rows: 16 MiB of similarities in float32. The plain loss holds three of them, this one three tiles."""
    anchors, candidates = (torch.randn(2048, 16).requires_grad_() for _ in range(2))
    peaks = []
    for loss in (plain, lambda *given: told(*given, tile=None)):
        with tensor_peak() as peak:
            loss(anchors, candidates, torch.arange(2048), True).mean().backward()
        peaks.append(peak.peak_bytes)
    assert peaks[0] >= 3 * 2048 * 2048 * 4
    assert peaks[1] <= 10 << 20


@pytest.mark.parametrize("both_ways", [False, True])
def test_the_derivative_has_a_derivative(both_ways):
    found = []
    for loss in (plain, lambda *given: told(*given, tile=4)):
        inputs = problem(2 * ROWS)
        slopes = torch.autograd.grad(loss(*inputs, both_ways).sum(), inputs[:2], create_graph=True)
        penalty = sum(slope.square().sum() for slope in slopes)
        found.append(torch.autograd.grad(penalty, inputs[:2]))
    assert all(relative(one, other) <= 1e-13 for one, other in zip(*found, strict=True))


def test_what_is_constant_gets_no_second_derivative():
    anchors, candidates, own = problem()
    found = []
    for loss in (plain, lambda *given: told(*given, tile=4)):
        (slope,) = torch.autograd.grad(loss(anchors, candidates.detach(), own, True).sum(), anchors, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), anchors)[0])
    assert relative(*found) <= 1e-13
