"""Batch norm that counts only what is no padding: as one written by hand over the undivided batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import wholebatch as wb
from menagerie import numbers, whole_numbers
from properties import flat, relative_error
from wholebatch.evidence import reference

FP64 = 1e-12
ROWS, CHANNELS = 11, 4
LENGTHS = (whole_numbers(7, ROWS, seed=2) + 1).tolist()


class ByHand(nn.Module):
    """Masked batch norm as people write it, over the rows that it sees."""

    def __init__(self, channels: int, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        values = x.movedim(1, -1)[kept]
        n = len(values)
        mean, var = values.mean(0), values.var(0, correction=0)
        self.num_batches_tracked += 1
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean += share * (mean.detach() - self.running_mean)
        self.running_var += share * (var.detach() * n / (n - 1) - self.running_var)
        shape = (1, -1, *(1,) * (x.ndim - 2))
        scaled = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
        return scaled * self.weight.view(shape) + self.bias.view(shape)


class Series(nn.Module):
    """Two convolutions over padded series of unequal length, each with a norm, and a mean over what is no padding."""

    def __init__(self, norm: Callable[[int], nn.Module], apply: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv1d(3, CHANNELS, 3, padding=1), nn.Conv1d(CHANNELS, CHANNELS, 1)])
        self.norms = nn.ModuleList([norm(CHANNELS), norm(CHANNELS)])
        self.apply_norm = apply

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.tanh(self.apply_norm(norm, layer(x * kept.unsqueeze(1)), kept))
        return (x * kept.unsqueeze(1)).sum(2) / kept.sum(1, keepdim=True)


def in_a_block(norm: nn.Module, x: Tensor, kept: Tensor) -> Tensor:
    with wb.mask_batch_norm(kept):
        return norm(x)


def flattened(norm: nn.Module, x: Tensor, kept: Tensor) -> Tensor:
    """Positions as rows, as after a linear layer."""
    with wb.mask_batch_norm(kept):
        return norm(x.movedim(1, -1).flatten(0, 1)).unflatten(0, kept.shape).movedim(-1, 1)


def ignored(norm: nn.Module, x: Tensor, kept: Tensor) -> Tensor:
    return norm(x)


def rows_of(dtype: torch.dtype) -> list[dict[str, Any]]:
    return [
        {"x": 2 + numbers(3, length, seed=number, dtype=dtype), "y": whole_numbers(CHANNELS, 1, seed=number)[0]}
        for number, length in enumerate(LENGTHS)
    ]


def padded(rows: list[dict[str, Any]], *, padding: float = 50.0, width: int = 0) -> dict[str, Tensor]:
    width = max([width, *(row["x"].shape[1] for row in rows)])
    return {
        "x": torch.stack([F.pad(row["x"], (0, width - row["x"].shape[1]), value=padding) for row in rows]),
        "kept": torch.stack([torch.arange(width) < row["x"].shape[1] for row in rows]),
        "y": torch.stack([row["y"] for row in rows]),
    }


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"], batch["kept"]), batch["y"])


def series(norm: Any, apply: Any, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(7)
    return Series(norm, apply).to(dtype)


def exact(apply: Any = in_a_block, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    return wb.exact_batch_norm(series(partial(nn.BatchNorm1d, **options), apply, dtype))


def trained(model: nn.Module, micro_batch: Any, collate: Any = padded, **options: Any) -> tuple[Tensor, Any]:
    """What three updates change in the weights, and the buffers that they leave; None: undivided."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = flat(model.parameters())
    rows = rows_of(next(model.parameters()).dtype)
    accumulator = wb.Accumulator(
        model, optimizer, loss_fn, micro_batch=micro_batch or wb.Rows(99), collate=collate, check=None, **options
    )
    for _ in range(3):
        if micro_batch is None:
            reference.update(model, optimizer, loss_fn, collate(rows))
        else:
            accumulator.step(rows)
    return flat(model.parameters()) - before, {name: each.clone() for name, each in model.named_buffers()}


def assert_same(found: Any, right: Any, within: float) -> None:
    assert relative_error(found[0], right[0]) <= within
    for name, buffer in right[1].items():
        torch.testing.assert_close(found[1][name], buffer, rtol=within, atol=within, msg=name)


CUTS = {
    "rows": wb.Rows(4),
    "single rows": wb.Rows(1),
    "by length": wb.Tokens(14, length=lambda row: row["x"].shape[1]),
    "undivided": wb.Rows(ROWS),
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("apply", [in_a_block, flattened])
@pytest.mark.parametrize("cut", CUTS)
def test_it_is_the_norm_written_by_hand_over_the_undivided_batch(cut, apply, momentum):
    """Each micro-batch is padded to its own longest row, and nothing of it is seen."""
    right = trained(series(partial(ByHand, momentum=momentum), lambda norm, x, kept: norm(x, kept)), None)
    assert_same(trained(exact(apply, momentum=momentum), CUTS[cut]), right, FP64)


def test_outside_an_accumulator_it_is_the_norm_written_by_hand():
    right = trained(series(ByHand, lambda norm, x, kept: norm(x, kept)), None)
    assert_same(trained(exact(), None), right, FP64)


def test_the_bound_sees_padding_that_counts_and_statistics_of_parts():
    right = trained(series(ByHand, lambda norm, x, kept: norm(x, kept)), None)[0]
    assert relative_error(trained(exact(ignored), wb.Rows(4))[0], right) > 1e-2
    by_hand = series(ByHand, lambda norm, x, kept: norm(x, kept))
    assert relative_error(trained(by_hand, wb.Rows(4), batch_norm="per_micro_batch")[0], right) > 1e-2


def test_neither_the_content_nor_the_width_of_padding_is_seen():
    right = trained(exact(), wb.Rows(4))
    for collate in (partial(padded, padding=-1e6), partial(padded, width=30)):
        assert_same(trained(exact(), wb.Rows(4), collate), right, 1e-9)


def test_in_fp32_and_under_autocast_the_difference_is_rounding():
    right = trained(exact(dtype=torch.float32), None)
    assert_same(trained(exact(dtype=torch.float32), wb.Rows(4)), right, 256 * torch.finfo(torch.float32).eps)
    half = {"precision": "bf16"}
    whole = trained(exact(dtype=torch.float32), wb.Rows(ROWS), **half)[0]
    cut = trained(exact(dtype=torch.float32), wb.Rows(4), **half)[0]
    assert relative_error(cut, whole) <= 8 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_whole_rows_may_be_padding(kind):
    """As where a batch is filled up: the result is that of the rows that are there."""
    x = numbers(10, 3, *(2, 3, 2)[: int(kind.__name__[-2])])
    kept = torch.arange(10) < 7
    masked, plain = wb.exact_batch_norm(kind(3).double()), kind(3).double()
    with wb.mask_batch_norm(kept):
        found = masked(x)
    torch.testing.assert_close(found[:7], plain(x[:7]))
    torch.testing.assert_close(dict(masked.named_buffers()), dict(plain.named_buffers()))


def test_where_nothing_counts_nothing_moves():
    norm = wb.exact_batch_norm(nn.BatchNorm1d(3))
    before = {name: each.clone() for name, each in norm.named_buffers()}
    with wb.mask_batch_norm(torch.zeros(5, dtype=torch.bool)):
        y = norm(numbers(5, 3, dtype=torch.float32).requires_grad_())
    y.sum().backward()
    assert y.isfinite().all()
    assert all(each.grad.isfinite().all() for each in norm.parameters())
    torch.testing.assert_close(dict(norm.named_buffers()), before)


def test_a_micro_batch_of_padding_alone_counts_for_nothing():
    x, kept = numbers(8, 3), torch.tensor([True] * 4 + [False] * 4)

    def masked(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        with wb.mask_batch_norm(batch["kept"]):
            y = model(batch["x"])
        return (y.square().sum(1) * batch["kept"]).sum(), int(batch["kept"].sum())

    def update(rows: int) -> Any:
        torch.manual_seed(1)
        model = wb.exact_batch_norm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double())
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        wb.Accumulator(model, optimizer, masked, micro_batch=wb.Rows(rows), check=None).step({"x": x, "kept": kept})
        return model.state_dict()

    torch.testing.assert_close(update(4), update(8), rtol=1e-12, atol=1e-12)


def test_a_block_within_a_block_and_evaluation():
    norm = wb.exact_batch_norm(nn.BatchNorm1d(3, affine=False)).double()
    plain = nn.BatchNorm1d(3, affine=False).double()
    x = numbers(6, 3)
    with wb.mask_batch_norm(torch.arange(6) < 4):
        with wb.mask_batch_norm(None):
            torch.testing.assert_close(norm(x), plain(x))
        torch.testing.assert_close(norm(x)[:4], plain(x[:4]))
        torch.testing.assert_close(norm.eval()(x), plain.eval()(x))


@pytest.mark.parametrize(
    ("kept", "found"),
    [
        (torch.ones(6), "torch.float32"),
        ([True] * 6, "list"),
        (torch.ones(5, dtype=torch.bool), r"\(5,\)"),
        (torch.ones(6, 2, dtype=torch.bool), r"\(6, 2\)"),
    ],
)
def test_what_says_nothing_about_the_positions_is_named(kept, found):
    norm = wb.exact_batch_norm(nn.BatchNorm1d(3)).double()
    with pytest.raises(wb.BatchNormError, match=found) as error, wb.mask_batch_norm(kept):
        norm(numbers(6, 3))
    assert "hint:" in str(error.value)


def test_a_mask_that_nobody_looks_at_is_an_error():
    with (
        pytest.raises(wb.BatchNormError, match="no exact batch norm ran"),
        wb.mask_batch_norm(torch.ones(6, dtype=torch.bool)),
    ):
        nn.BatchNorm1d(3).double()(numbers(6, 3))


def test_an_error_in_the_block_comes_out_as_it_is():
    with pytest.raises(KeyError), wb.mask_batch_norm(torch.ones(6, dtype=torch.bool)):
        raise KeyError
