"""How hard is it to tell an anchor's own candidate from all others? The matrix of similarities never exists whole."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TILE = 1 << 20
"""Similarities that exist at a time on a CPU where nobody says how many; they stay in its cache. Unit: bytes."""

LARGE_TILE = 64 << 20
"""The same on other devices, where each tile costs some dozen kernels. Unit: bytes."""

FEWEST = 32
"""Rows of a tile at the least where nobody says how many; a product of fewer is slow. Unit: rows."""


def told_apart(
    anchors: Tensor, candidates: Tensor, own: Tensor, *, both_ways: bool, tile: int | None, multiply_in: torch.dtype
) -> Tensor:
    """Return how hard it is to tell each anchor's own candidate from all others.

    Args:
        anchors: Shape ``[rows, width]``.
        candidates: Shape ``[candidates, width]``.
        own: Which candidate is the anchor's own; shape ``[rows]``.
        both_ways: Average with how hard it is to tell that anchor from the other anchors for its candidate. Then the
            first candidates are those of the anchors, in their order.
        tile: Anchors that are compared at a time; None: as many as is good. Unit: rows.
        multiply_in: The dtype of the products.

    Returns:
        Shape ``[rows]``, in 32 bits at least.
    """
    if tile is None:
        nbytes = TILE if anchors.device.type == "cpu" else LARGE_TILE
        tile = max(FEWEST, nbytes // (4 * max(1, len(candidates))))
    with torch.autocast(anchors.device.type, enabled=False):
        return _ToldApart.apply(anchors, candidates, own, both_ways, tile, multiply_in)  # type: ignore[no-any-return, no-untyped-call]


class _ToldApart(torch.autograd.Function):
    """With the similarities s_ij of anchors and candidates, and the sums over their rows and columns

        R_i = log sum_j exp s_ij,    C_j = log sum_i exp s_ij,

    the loss of anchor i is R_i - s_ii, whose derivative by s_ij is exp(s_ij - R_i) - [i = j]; both ways it is the mean
    of that and of C_i - s_ii. The sums are kept for the backward pass, and the similarities computed anew.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        candidates: Tensor,
        own: Tensor,
        both_ways: bool,
        tile: int,
        multiply_in: torch.dtype,
    ) -> Tensor:
        rows, columns, same = [], [], []
        for part, similar in _similarities(anchors, candidates, tile, multiply_in):
            rows.append(similar.logsumexp(1))
            same.append(similar.gather(1, own[part].unsqueeze(1)).squeeze(1))
            if both_ways:
                columns.append(similar[:, : len(anchors)].logsumexp(0))
        row, column = torch.cat(rows), torch.stack(columns).logsumexp(0) if both_ways else None
        ctx.save_for_backward(anchors, candidates, own, row, column)
        ctx.tile, ctx.multiply_in = tile, multiply_in
        return (row if column is None else (row + column) / 2) - torch.cat(same)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        anchors, candidates, own, row, column = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates the derivative
            loss = _at_once(anchors, candidates, own, column is not None, ctx.multiply_in)
            learning = [each for each in (anchors, candidates) if each.requires_grad]
            found = iter(torch.autograd.grad(loss, learning, gradient, create_graph=True))
            return *(next(found) if each.requires_grad else None for each in (anchors, candidates)), *[None] * 4
        # A gradient that carries a loss scale, summed over all rows, leaves the range of fp16.
        dtype = row.dtype if ctx.multiply_in == torch.float16 else ctx.multiply_in
        multiplied = candidates.to(dtype)
        share = gradient if column is None else gradient / 2
        d_anchors = torch.empty_like(anchors)
        d_candidates = torch.zeros_like(candidates, dtype=row.dtype)
        for part, similar in _similarities(anchors, candidates, ctx.tile, ctx.multiply_in):
            by_column = None if column is None else similar[:, : len(anchors)].sub(column).exp_().mul_(share)
            d_similar = similar.sub_(row[part].unsqueeze(1)).exp_().mul_(share[part].unsqueeze(1))
            if by_column is not None:
                d_similar[:, : len(anchors)] += by_column
            d_similar.scatter_add_(1, own[part].unsqueeze(1), -gradient[part].unsqueeze(1))
            narrow = d_similar.to(dtype)
            d_anchors[part] = narrow @ multiplied
            d_candidates += narrow.T @ anchors[part].to(dtype)
        return d_anchors, d_candidates.to(candidates.dtype), *[None] * 4


def _at_once(anchors: Tensor, candidates: Tensor, own: Tensor, both_ways: bool, multiply_in: torch.dtype) -> Tensor:
    """Return the same loss, in operations that PyTorch can differentiate any number of times."""
    ((_, similar),) = _similarities(anchors, candidates, len(anchors), multiply_in)
    same = similar.gather(1, own.unsqueeze(1)).squeeze(1)
    row = similar.logsumexp(1)
    return ((row + similar[:, : len(anchors)].logsumexp(0)) / 2 if both_ways else row) - same


def _similarities(
    anchors: Tensor, candidates: Tensor, tile: int, multiply_in: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the similarities of some anchors with all candidates, in 32 bits at least, and which anchors these are."""
    wide = torch.promote_types(anchors.dtype, torch.float32)
    columns = candidates.to(multiply_in).T
    for start in range(0, max(1, len(anchors)), tile):
        part = slice(start, start + tile)
        yield part, (anchors[part].to(multiply_in) @ columns).to(wide)
