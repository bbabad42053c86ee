"""Batch norm over the whole logical batch, however it is cut.

Each layer is a meeting. A micro-batch brings the moments of its n_k values a channel, and gets those of all:

    n = sum n_k,   mean = sum n_k mean_k / n,   M2 = sum ( M2_k + n_k (mean_k - mean)^2 ),   var = M2 / n,

which is stable where a sum of squares is not (Chan, Golub and LeVeque, 1979). Gradients flow back through the moments
to every micro-batch.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, SupportsIndex, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from wholebatch.core.errors import BatchNormError
from wholebatch.engine.company import Order, here, meet
from wholebatch.engine.device import modules

Module = TypeVar("Module", bound=nn.Module)


def exact_batch_norm(model: Module) -> Module:
    """Let batch norm compute over the whole logical batch, across its micro-batches.

    Outputs, gradients, running statistics and ``num_batches_tracked`` are those of one undivided forward pass. The
    layers stay where they are, with the same parameters, buffers and names, so that optimizers and checkpoints do not
    notice; outside an accumulator they compute as before. Micro-batches that meet in every layer share one graph, so
    their activations are all held until the backward pass (``lockstep="joined"``).

    Args:
        model: Changed in place. Batch norm of every kind is found at every depth, also lazy and synchronised ones;
            frozen layers stay frozen.

    Returns:
        The model.

    Example:
        >>> import wholebatch as wb
        >>> model = exact_batch_norm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> accumulator = wb.Accumulator(model, optimizer, lambda model, x: model(x).mean(), micro_batch=wb.Rows(2))
        >>> accumulator.step(torch.randn(6, 3)).micro_batches
        3
        >>> model[1].num_batches_tracked
        tensor(1)
    """
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and not isinstance(layer, _Exact) and not hasattr(layer, "is_frozen"):
            object.__setattr__(layer, "__class__", _exact(type(layer)))
    return model


def exact_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers that meet in every forward pass: exact batch norm that is not in evaluation."""
    if not _made:
        return []
    if not any(is_exact(layer) and _uses_batch(layer) for layer in modules(model)):
        return []
    return [
        name or type(layer).__name__ for name, layer in model.named_modules() if is_exact(layer) and _uses_batch(layer)
    ]


def is_exact(layer: nn.Module) -> bool:
    """Return whether a layer computes over the whole logical batch."""
    return isinstance(layer, _Exact)


class _Exact(nn.Module):
    """Mixed into a batch norm layer: in company, its statistics are those of all micro-batches."""

    _reached = False

    def forward(self, x: Tensor) -> Tensor:
        self._reached = True
        layer = cast(_BatchNorm, self)
        if here() is None or not _uses_batch(layer):
            return super().forward(x)  # type: ignore[no-any-return]
        layer._check_input_dim(x)  # type: ignore[no-untyped-call]
        moments = meet(
            "exact batch norm",
            _Moments.apply(x),  # type: ignore[no-untyped-call]
            partial(_merge, layer.eps),
            beside=(x.numel() // x.shape[1], tuple(x.shape)),
            once=partial(_track, layer),
            of=self,
        )
        result: Tensor = _Normalize.apply(x, moments, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
        return result

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        plain = next(kind for kind in type(self).__mro__ if not issubclass(kind, _Exact))
        return _unpickle, (plain,), *super().__reduce_ex__(protocol)[2:]


class ExactBatchNorm1d(_Exact, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` over the whole logical batch, made by `exact_batch_norm`."""


class ExactBatchNorm2d(_Exact, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` over the whole logical batch, made by `exact_batch_norm`."""


class ExactBatchNorm3d(_Exact, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` over the whole logical batch, made by `exact_batch_norm`."""


class ExactSyncBatchNorm(_Exact, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` over the whole logical batch, made by `exact_batch_norm`."""


class ExactLazyBatchNorm1d(_Exact, nn.LazyBatchNorm1d):
    """`torch.nn.LazyBatchNorm1d` that becomes exact when it learns its channels."""

    cls_to_become = ExactBatchNorm1d


class ExactLazyBatchNorm2d(_Exact, nn.LazyBatchNorm2d):
    """`torch.nn.LazyBatchNorm2d` that becomes exact when it learns its channels."""

    cls_to_become = ExactBatchNorm2d


class ExactLazyBatchNorm3d(_Exact, nn.LazyBatchNorm3d):
    """`torch.nn.LazyBatchNorm3d` that becomes exact when it learns its channels."""

    cls_to_become = ExactBatchNorm3d


_EXACT: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: ExactBatchNorm1d,
    nn.BatchNorm2d: ExactBatchNorm2d,
    nn.BatchNorm3d: ExactBatchNorm3d,
    nn.SyncBatchNorm: ExactSyncBatchNorm,
    nn.LazyBatchNorm1d: ExactLazyBatchNorm1d,
    nn.LazyBatchNorm2d: ExactLazyBatchNorm2d,
    nn.LazyBatchNorm3d: ExactLazyBatchNorm3d,
}

_made: list[type[nn.Module]] = []
"""The exact kinds that are in use in this process; while there is none, no model is searched for them."""


def _exact(kind: type[nn.Module]) -> type[nn.Module]:
    """The exact kind of a layer. For a subclass that somebody else wrote it is made here, below that class."""
    if kind not in _EXACT:
        plain = next((base for base in kind.__mro__ if base in _EXACT), None)
        if plain is None:
            raise BatchNormError(
                f"{kind.__name__} is a batch norm of a kind that is not known here.",
                hint='convert it instead: wb.convert_batch_norm(model, to="group").',
            )
        below: dict[str, Any] = {"__module__": kind.__module__}
        if kind.forward is not plain.forward:
            below["forward"] = _require_reached(kind)
        _EXACT[kind] = type(f"Exact{kind.__name__}", (kind, _EXACT[plain]), below)
    if _EXACT[kind] not in _made:
        _made.append(_EXACT[kind])
    return _EXACT[kind]


def _require_reached(kind: type[nn.Module]) -> Any:
    """A forward pass of somebody else, that has to come by the exact one."""

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        self._reached = False
        output = kind.forward(self, *inputs, **named)
        if here() is not None and _uses_batch(self) and not self._reached:
            raise BatchNormError(
                f"{kind.__name__} computes its statistics in a way of its own, which ends with the micro-batch.",
                hint="let its forward pass call super().forward(x), or convert it with wb.convert_batch_norm.",
            )
        return output

    return forward


def _unpickle(kind: type[nn.Module]) -> nn.Module:
    exact = _exact(kind)
    return exact.__new__(exact)


def _uses_batch(layer: Any) -> bool:
    return bool(layer.training or (layer.running_mean is None and layer.running_var is None))


def _merge(eps: float, values: Sequence[Tensor], beside: Sequence[Any], _order: Order) -> Tensor:
    """Return mean, 1 / deviation and variance of all values from the moments of some; shape ``[3, channels]``."""
    counts = [count for count, _ in beside]
    total = sum(counts)
    if total <= 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {beside[0][1]}")
    means, squares = torch.stack(list(values), dim=1)
    if len(set(counts)) == 1:
        mean = means.mean(0)
        between = (means - mean).square().sum(0) * counts[0]
    else:
        weights = torch.tensor(counts, dtype=means.dtype, device="cpu")
        weights = weights.to(means.device, non_blocking=True).unsqueeze(1)
        mean = (means * (weights / total)).sum(0)
        between = ((means - mean).square() * weights).sum(0)
    variance = (squares.sum(0) + between) / total
    return torch.stack([mean, torch.rsqrt(variance + eps), variance])


def _track(layer: _BatchNorm, moments: Tensor, beside: Sequence[Any]) -> None:
    """Move the running statistics as one undivided forward pass does."""
    if not (layer.training and layer.track_running_stats) or layer.running_mean is None or layer.running_var is None:
        return
    share: Any = layer.momentum
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if layer.momentum is None:
            share = 1.0 / layer.num_batches_tracked
    total = sum(count for count, _ in beside)
    mean, _, variance = moments.detach()
    with torch.no_grad():
        layer.running_mean.mul_(1 - share).add_((mean * share).to(layer.running_mean.dtype))
        unbiased = variance * (total / (total - 1))
        layer.running_var.mul_(1 - share).add_((unbiased * share).to(layer.running_var.dtype))


class _Moments(torch.autograd.Function):
    """Mean, and sum of squared deviations from it, of each channel; shape ``[2, channels]``. Saves its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = _widened(x)
        if x.device.type in ("cpu", "cuda"):  # torch's own kernel; var_mean takes three times as long
            mean, variance = torch.ops.aten.batch_norm_update_stats(wide, None, None, 0.0)
        else:
            variance, mean = torch.var_mean(wide, dim=_dims(x), correction=0)
        ctx.save_for_backward(x, mean)
        return torch.stack([mean, variance * (x.numel() // x.shape[1])])

    @staticmethod
    def backward(ctx: Any, d_moments: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        wide = _widened(x)
        if torch.is_grad_enabled():  # a second derivative is wanted, and the mean depends on x
            mean = wide.mean(_dims(x))
        d_mean, d_squares = d_moments
        slope = 2 * d_squares
        shift = d_mean * (x.shape[1] / x.numel()) - slope * mean
        return torch.addcmul(_over(shift, x), wide, _over(slope, x)).to(x.dtype)


class _Normalize(torch.autograd.Function):
    """``(x - mean) * scale * weight + bias``, differentiable in all five. Saves its input alone.

    What belongs to the batch is in `moments`: mean, scale, and the variance, which is not used here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, moments: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, moments, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        mean, scale, _ = moments
        slope = scale if weight is None else scale * weight
        wide_bias = None if bias is None else bias.to(mean.dtype)
        return functional.batch_norm(x, mean, torch.ones_like(mean), slope, wide_bias, training=False, eps=0.0)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, moments, weight = ctx.saved_tensors
        mean, scale, _ = moments
        slope = scale if weight is None else scale * weight
        if torch.is_grad_enabled():  # a second derivative is wanted
            wide = _widened(d_y)
            d_x = (wide * _over(slope, x)).to(x.dtype)
            d_bias = wide.sum(_dims(x))
            d_slope = (wide * (_widened(x) - _over(mean, x))).sum(_dims(x))
        else:
            d_x, d_slope, d_bias = torch.ops.aten.native_batch_norm_backward(
                d_y, x, slope, mean, torch.ones_like(mean), None, None, False, 0.0, [True, True, True]
            )
        d_scale = d_slope if weight is None else d_slope * weight
        d_moments = torch.stack([-slope * d_bias, d_scale, torch.zeros_like(mean)])
        d_weight = None if weight is None else (d_slope * scale).to(weight.dtype)
        return d_x, d_moments, d_weight, None if ctx.bias_dtype is None else d_bias.to(ctx.bias_dtype)


def _dims(x: Tensor) -> list[int]:
    """The dimensions over which a channel's values lie."""
    return [0, *range(2, x.ndim)]


def _over(channels: Tensor, x: Tensor) -> Tensor:
    """A value for each channel, in a shape that goes with `x`."""
    return channels.view(1, -1, *(1,) * (x.ndim - 2))


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.element_size() < 4 else x
