"""What does batch norm compute, when its rows lie in several micro-batches? Moments, their merge, and what follows.

A micro-batch brings mean and variance of its n_k values a channel, and gets those of all:

    n = sum n_k,   mean = sum n_k mean_k / n,   var = sum n_k ( var_k + (mean_k - mean)^2 ) / n,

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
    """Return mean and variance of each channel.

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
    divisor = count.clamp(min=1)
    mean = torch.where(kept, wide, 0.0).sum(dims) / divisor
    squares = torch.where(kept, wide - _over(mean, x), 0.0).square().sum(dims)
    return torch.stack([mean, squares / divisor]), count


def merge(counts: Sequence[Count], moments: Sequence[Tensor]) -> Tensor:
    """Return mean and variance of all values from those of some; shape ``[2, channels]``.

    Args:
        counts: Values a channel of each part.
        moments: As from `moments_of`.
    """
    equal = not any(isinstance(count, Tensor) for count in counts) and len(set(counts)) == 1
    shares = 1.0 / len(counts) if equal else _on_device(counts, moments[0]) / total_of(counts)
    result: Tensor = _Merge.apply(shares, *moments)  # type: ignore[no-untyped-call]
    return result


def total_of(counts: Sequence[Count]) -> Count:
    """Return the sum of some counts; on the device, and at least 1, where one of them is there."""
    total: Count = sum(counts)
    return total.clamp(min=1) if isinstance(total, Tensor) else total


def normalize(
    x: Tensor, moments: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relay: Relay | None
) -> Tensor:
    """Return ``(x - mean) / sqrt(var + eps) * weight + bias``, differentiable in all tensors.

    Args:
        x: Shape ``[rows, channels, ...]``.
        moments: Mean and variance; shape ``[2, channels]``.
        weight: Shape ``[channels]``, or None.
        bias: Shape ``[channels]``, or None.
        eps: Added to the variance.
        relay: Takes the gradient of `x` to where the moments of `x` came from, which adds its own. It must be on the
            way: `moments` have come from there.
    """
    result: Tensor = _Normalize.apply(x, moments, weight, bias, eps, relay)  # type: ignore[no-untyped-call]
    return result


class _Moments(torch.autograd.Function):
    """See `moments_of`. Saves its input, and the mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, relay: Relay) -> Tensor:
        wide = widened(x)
        if not x.numel():  # none of its rows has come to this layer
            mean = variance = wide.new_zeros(x.shape[1])
        elif x.device.type in ("cpu", "cuda"):  # torch's own kernel; var_mean takes three times as long
            mean, variance = torch.ops.aten.batch_norm_update_stats(wide, None, None, 0.0)
        else:
            variance, mean = torch.var_mean(wide, dim=_dims(x), correction=0)
        ctx.save_for_backward(x, mean)
        ctx.relay = relay
        return torch.stack([mean, variance])

    @staticmethod
    def backward(ctx: Any, d_moments: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        d_mean, d_variance = (d_moments / (x.numel() // x.shape[1])).unbind(0)
        if torch.is_grad_enabled():  # a second derivative is wanted, and the mean depends on x
            wide = widened(x)
            d_x = 2 * _over(d_variance, x) * (wide - _over(wide.mean(_dims(x)), x)) + _over(d_mean, x)
            return d_x.to(x.dtype), None
        doubles = torch.full_like(mean, 0.25)  # as a variance: what is divided by its root counts twice
        d_x = _normalized(x, mean, doubles, d_variance, d_mean, 0.0)
        rest = ctx.relay.take()
        return d_x if rest is None else d_x.addcmul_(rest[0], _over(rest[1], x)), None


class _Merge(torch.autograd.Function):
    """See `merge`. The gradients of all moments in a handful of operations."""

    @staticmethod
    def forward(ctx: Any, shares: float | Tensor, *moments: Tensor) -> Tensor:
        result, apart = _merged(shares, moments)
        ctx.shares = shares
        ctx.save_for_backward(apart, *moments)  # saved, so that a second backward pass through it is an error
        return result

    @staticmethod
    def backward(ctx: Any, d_result: Tensor) -> tuple[Tensor | None, ...]:
        apart, *moments = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            again, _ = _merged(ctx.shares, moments)
            wanted = [each for each in moments if each.requires_grad]
            found = iter(torch.autograd.grad(again, wanted, d_result, create_graph=True))
            return None, *(next(found) if each.requires_grad else None for each in moments)
        d_mean, d_variance = d_result.unbind(0)
        d_means = torch.addcmul(d_mean, apart, d_variance, value=2.0)
        d_moments = torch.stack([d_means, d_variance.expand_as(d_means)], dim=1).mul_(ctx.shares)
        return None, *d_moments.unbind(0)


def _merged(shares: float | Tensor, moments: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of all, and how far the mean of each part is from it; shape ``[parts, channels]``."""
    each = torch.stack(list(moments))
    both = each.mean(0) if isinstance(shares, float) else (each * shares).sum(0)
    mean, within = both.unbind(0)
    apart = each[:, 0] - mean
    squares = apart.square()
    between = squares.mean(0) if isinstance(shares, float) else (squares * shares[:, 0]).sum(0)
    return torch.stack([mean, within + between]), apart


class _Normalize(torch.autograd.Function):
    """See `normalize`. Saves its input alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        moments: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        relay: Relay | None,
    ) -> Tensor:
        ctx.save_for_backward(x, moments, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.eps, ctx.relay = eps, relay
        mean, variance = moments.unbind(0)
        return _normalized(x, mean, variance, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, moments, weight = ctx.saved_tensors
        mean, variance = moments.unbind(0)
        scale = (variance + ctx.eps).rsqrt()
        slope = scale if weight is None else scale * weight
        if torch.is_grad_enabled() or not x.numel():  # a second derivative is wanted; torch's kernel takes no empty x
            wide = widened(d_y)
            d_x = (wide * _over(slope, x)).to(x.dtype)
            d_bias = wide.sum(_dims(x))
            d_weight = (wide * (widened(x) - _over(mean, x))).sum(_dims(x)) * scale
        else:
            asked = [ctx.relay is None, True, True]
            factor = torch.ones_like(mean) if weight is None else _like(mean, weight)
            d_x, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
                d_y, x, factor, mean, variance, None, None, False, ctx.eps, asked
            )
            if ctx.relay is not None:
                ctx.relay.put(d_y, slope)
                d_x = None
        d_moments = torch.stack([-slope * d_bias, -0.5 * slope * scale * d_weight])
        d_own_weight = None if weight is None else d_weight.to(weight.dtype)
        d_own_bias = None if ctx.bias_dtype is None else d_bias.to(ctx.bias_dtype)
        return d_x, d_moments, d_own_weight, d_own_bias, None, None


def _normalized(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Batch norm by given moments: the kernel does it in one pass, also for narrower `x`."""
    return torch.batch_norm(x, _like(mean, weight), _like(mean, bias), mean, variance, False, 0.0, eps, True)


def _like(moments: Tensor, affine: Any) -> Any:
    """A weight or a bias in the dtype of the moments."""
    return affine if affine is None or affine.dtype == moments.dtype else affine.to(moments.dtype)


def _on_device(counts: Sequence[Count], like: Tensor) -> Tensor:
    """Counts in the dtype of the moments; shape ``[parts, 1, 1]``."""
    if any(isinstance(count, Tensor) for count in counts):
        column = torch.stack([torch.as_tensor(count, device=like.device) for count in counts])
    else:
        column = torch.tensor(counts, dtype=like.dtype, device="cpu")
    return column.to(like.device, like.dtype, non_blocking=True).view(-1, 1, 1)


def _dims(x: Tensor) -> list[int]:
    """The dimensions over which a channel's values lie."""
    return [0, *range(2, x.ndim)]


def _over(channels: Tensor, x: Tensor) -> Tensor:
    """A value for each channel, in a shape that goes with `x`."""
    return channels.view(1, -1, *(1,) * (x.ndim - 2))
