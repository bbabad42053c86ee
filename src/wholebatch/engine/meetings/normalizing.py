"""What does batch norm compute, when its rows lie in several micro-batches? Moments, their merge, and what follows.

A micro-batch brings the moments of its n_k values a channel, and gets those of all:

    n = sum n_k,   mean = sum n_k mean_k / n,   M2 = sum ( M2_k + n_k (mean_k - mean)^2 ),   var = M2 / n,

which is stable where a sum of squares is not (Chan, Golub and LeVeque, 1979). Gradients flow back through the moments
to every micro-batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wholebatch.engine.precision import widened

Count = int | Tensor
"""Values a channel: known, or counted on the device where a mask says which count."""


class Relay:
    """Takes what a part of a gradient is made of from one place in a backward pass to a later one, which makes it."""

    __slots__ = ("_carried", "_task")

    def __init__(self) -> None:
        self._carried: tuple[Tensor, Tensor] | None = None
        self._task = -1

    def put(self, d_y: Tensor, slope: Tensor) -> None:
        """Leave the two factors of a part: of the values, and of their channels."""
        self._carried, self._task = (d_y, slope), torch._C._current_graph_task_id()

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Return what was left in this backward pass; what an earlier one left is forgotten."""
        carried, self._carried = self._carried, None
        return carried if self._task == torch._C._current_graph_task_id() else None


def moments_of(x: Tensor, relay: Relay) -> Tensor:
    """Return mean, and sum of squared deviations from it, of each channel.

    Args:
        x: Shape ``[rows, channels, ...]``.
        relay: Brings the rest of the gradient of `x`, if `normalize` got the same one.

    Returns:
        Shape ``[2, channels]``, at least in float32.
    """
    result: Tensor = _Moments.apply(x, relay)  # type: ignore[no-untyped-call]
    return result


def moments_of_kept(x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return the moments of the values that count, and how many they are a channel.

    Args:
        x: Shape ``[rows, channels, ...]``.
        kept: Which positions count, in a shape that goes with `x` and has one channel.
    """
    wide, dims = widened(x), _dims(x)
    count = kept.expand(len(x), 1, *x.shape[2:]).sum()
    mean = torch.where(kept, wide, 0.0).sum(dims) / count.clamp(min=1)
    squares = torch.where(kept, wide - _over(mean, x), 0.0).square().sum(dims)
    return torch.stack([mean, squares]), count


def merge(eps: float, counts: Sequence[Count], moments: Sequence[Tensor]) -> Tensor:
    """Return mean, 1 / deviation and variance of all values from the moments of some; shape ``[3, channels]``.

    Args:
        eps: Added to the variance before its root is taken.
        counts: Values a channel of each part.
        moments: As from `moments_of`.
    """
    equal = not any(isinstance(count, Tensor) for count in counts) and len(set(counts)) == 1
    shares: Count = counts[0] if equal else _on_device(counts, moments[0])
    result: Tensor = _Merge.apply(eps, shares, total_of(counts), *moments)  # type: ignore[no-untyped-call]
    return result


def total_of(counts: Sequence[Count]) -> Count:
    """Return the sum of some counts; on the device, and at least 1, where one of them is there."""
    total: Count = sum(counts)
    return total.clamp(min=1) if isinstance(total, Tensor) else total


def normalize(x: Tensor, moments: Tensor, weight: Tensor | None, bias: Tensor | None, relay: Relay | None) -> Tensor:
    """Return ``(x - mean) * scale * weight + bias``, differentiable in all five.

    Args:
        x: Shape ``[rows, channels, ...]``.
        moments: Mean, scale and variance, which is not used; shape ``[3, channels]``.
        weight: Shape ``[channels]``, or None.
        bias: Shape ``[channels]``, or None.
        relay: Takes the gradient of `x` to where the moments of `x` came from, which adds its own. It must be on the
            way: `moments` have come from there.
    """
    result: Tensor = _Normalize.apply(x, moments, weight, bias, relay)  # type: ignore[no-untyped-call]
    return result


class _Moments(torch.autograd.Function):
    """See `moments_of`. Saves its input, and the mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, relay: Relay) -> Tensor:
        wide = widened(x)
        if x.device.type in ("cpu", "cuda"):  # torch's own kernel; var_mean takes three times as long
            mean, variance = torch.ops.aten.batch_norm_update_stats(wide, None, None, 0.0)
        else:
            variance, mean = torch.var_mean(wide, dim=_dims(x), correction=0)
        ctx.save_for_backward(x, mean)
        ctx.relay = relay
        return torch.stack([mean, variance.mul_(x.numel() // x.shape[1])])

    @staticmethod
    def backward(ctx: Any, d_moments: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        if torch.is_grad_enabled():  # a second derivative is wanted, and the mean depends on x
            wide = widened(x)
            d_mean, d_squares = d_moments
            d_x = 2 * _over(d_squares, x) * (wide - _over(wide.mean(_dims(x)), x)) + _over(d_mean / count, x)
            return d_x.to(x.dtype), None
        d_mean, d_squares = d_moments.unbind(0)
        shift, slope = d_mean / count, 2 * d_squares
        d_x = _affine(x, mean, slope, shift)
        rest = ctx.relay.take()
        return d_x if rest is None else d_x.addcmul_(rest[0], _over(rest[1], x)), None


class _Merge(torch.autograd.Function):
    """See `merge`. The gradients of all moments in a handful of operations."""

    @staticmethod
    def forward(ctx: Any, eps: float, counts: Count, total: Count, *moments: Tensor) -> Tensor:
        result = _merged(eps, counts, total, moments)
        ctx.eps, ctx.counts, ctx.total = eps, counts, total
        ctx.save_for_backward(result, *moments)
        return result

    @staticmethod
    def backward(ctx: Any, d_result: Tensor) -> tuple[Tensor | None, ...]:
        result, *moments = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            again = _merged(ctx.eps, ctx.counts, ctx.total, moments)
            wanted = [each for each in moments if each.requires_grad]
            found = iter(torch.autograd.grad(again, wanted, d_result, create_graph=True))
            return None, None, None, *(next(found) if each.requires_grad else None for each in moments)
        mean, scale, _ = result
        d_mean, d_scale, d_variance = d_result
        slope = (d_variance - scale.pow(3).mul_(d_scale).mul_(0.5)).div_(ctx.total)
        means, _ = torch.stack(moments, dim=1)
        d_means = torch.addcmul(d_mean / ctx.total, means - mean, slope, value=2.0).mul_(ctx.counts)
        d_squares = slope.expand_as(means)
        return None, None, None, *torch.stack([d_means, d_squares], dim=1).unbind(0)


def _merged(eps: float, counts: Count, total: Count, moments: Sequence[Tensor]) -> Tensor:
    means, squares = torch.stack(list(moments), dim=1)
    mean = means.mean(0) if isinstance(counts, int) else (means * (counts / total)).sum(0)
    between = ((means - mean).square() * counts).sum(0)
    variance = (squares.sum(0) + between) / total
    return torch.stack([mean, torch.rsqrt(variance + eps), variance])


class _Normalize(torch.autograd.Function):
    """See `normalize`. Saves its input alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, moments: Tensor, weight: Tensor | None, bias: Tensor | None, relay: Relay | None
    ) -> Tensor:
        ctx.save_for_backward(x, moments, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.relay = relay
        mean, scale, _ = moments.unbind(0)
        slope = scale if weight is None else scale * weight
        wide_bias = None if bias is None else bias.to(mean.dtype)
        return _affine(x, mean, slope, wide_bias)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, moments, weight = ctx.saved_tensors
        mean, scale, variance = moments.unbind(0)
        slope = scale if weight is None else scale * weight
        if torch.is_grad_enabled():  # a second derivative is wanted
            wide = widened(d_y)
            d_x = (wide * _over(slope, x)).to(x.dtype)
            d_bias = wide.sum(_dims(x))
            d_slope = (wide * (widened(x) - _over(mean, x))).sum(_dims(x))
        else:
            asked = [ctx.relay is None, True, True]
            d_x, d_slope, d_bias = torch.ops.aten.native_batch_norm_backward(
                d_y, x, slope, mean, torch.ones_like(mean), None, None, False, 0.0, asked
            )
            if ctx.relay is not None:
                ctx.relay.put(d_y, slope)
                d_x = None
        d_scale = d_slope if weight is None else d_slope * weight
        d_moments = torch.stack([-slope * d_bias, d_scale, torch.zeros_like(variance)])
        d_weight = None if weight is None else (d_slope * scale).to(weight.dtype)
        return d_x, d_moments, d_weight, None if ctx.bias_dtype is None else d_bias.to(ctx.bias_dtype), None


def _affine(x: Tensor, mean: Tensor, slope: Tensor, shift: Tensor | None) -> Tensor:
    """Return ``(x - mean) * slope + shift`` by the kernel that does it in one pass, also for narrower `x`."""
    return torch.batch_norm(x, slope, shift, mean, torch.ones_like(mean), False, 0.0, 0.0, True)


def _on_device(counts: Sequence[Count], like: Tensor) -> Tensor:
    """Counts as a column, in the dtype of the moments; shape ``[parts, 1]``."""
    if any(isinstance(count, Tensor) for count in counts):
        column = torch.stack([torch.as_tensor(count, device=like.device) for count in counts])
    else:
        column = torch.tensor(counts, dtype=like.dtype, device="cpu")
    return column.to(like.device, like.dtype, non_blocking=True).unsqueeze(1)


def _dims(x: Tensor) -> list[int]:
    """The dimensions over which a channel's values lie."""
    return [0, *range(2, x.ndim)]


def _over(channels: Tensor, x: Tensor) -> Tensor:
    """A value for each channel, in a shape that goes with `x`."""
    return channels.view(1, -1, *(1,) * (x.ndim - 2))
