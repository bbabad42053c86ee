"""Batch norm over the whole logical batch, however it is cut.

Each layer is a meeting: a micro-batch brings the moments of its values, and gets those of all.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, SupportsIndex, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wholebatch.core.errors import BatchNormError
from wholebatch.engine.device import modules
from wholebatch.engine.meetings.call import Order
from wholebatch.engine.meetings.company import among, here, meet
from wholebatch.engine.meetings.normalizing import Relay, merge, moments_of, moments_of_kept, normalize, total_of
from wholebatch.engine.meetings.normmask import kept_positions
from wholebatch.engine.meetings.singly import Alone

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

    Raises:
        BatchNormError: `model` is no module.

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
    require_module(model)
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and not isinstance(layer, _Exact) and not hasattr(layer, "is_frozen"):
            object.__setattr__(layer, "__class__", _exact(type(layer)))
    return model


def require_module(model: object) -> None:
    """Raise an error if something is no module, such as a list of some.

    Raises:
        BatchNormError: It is none.
    """
    if not isinstance(model, nn.Module):
        raise BatchNormError(
            f"Batch norm is looked for in a module, and this is a {type(model).__name__}.",
            hint="pass the torch.nn.Module itself; several go one by one, or together in a torch.nn.ModuleList.",
        )


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
        self.__dict__["_reached"] = True  # a module takes ten times as long to set an attribute
        layer = cast(_BatchNorm, self)
        kept = kept_positions(x)
        if not _uses_batch(layer) or (kept is None and here() is None):
            return super().forward(x)  # type: ignore[no-any-return]
        if here() is None:
            with among(Alone()):
                return _Exact.forward(self, x)
        layer._check_input_dim(x)  # type: ignore[no-untyped-call]
        relay, count = Relay(), x.numel() // x.shape[1]
        value, counted = (moments_of(x, relay), count) if kept is None else moments_of_kept(x, kept)
        moments = meet(
            "exact batch norm",
            value,
            _merge,
            beside=(counted, tuple(x.shape)),
            once=partial(_track, layer),
            of=self,
        )
        on_the_way = kept is None and moments.requires_grad and value.requires_grad
        return normalize(x, moments, layer.weight, layer.bias, layer.eps, relay if on_the_way else None)

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


def _merge(values: Sequence[Tensor], beside: Sequence[Any], _order: Order) -> Tensor:
    counts, shape = [count for count, _ in beside], beside[0][1]
    total = total_of(counts)
    if not isinstance(total, Tensor) and total <= 1:
        raise ValueError(
            "Exact batch norm needs more than 1 value per channel in training mode, "
            f"and all rows that meet have {total} (input size {shape})."
        )
    return merge(counts, values)


def _track(layer: _BatchNorm, moments: Tensor, beside: Sequence[Any]) -> None:
    """Move the running statistics as one undivided forward pass does; where nothing counts, let them be."""
    if not (layer.training and layer.track_running_stats) or layer.running_mean is None or layer.running_var is None:
        return
    counts = [count for count, _ in beside]
    total, (mean, variance) = total_of(counts), moments.detach().unbind(0)
    moves: Any = torch.as_tensor(sum(counts) > 0) if isinstance(total, Tensor) else 1
    share: Any = layer.momentum
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(moves)
        if layer.momentum is None:
            share = 1.0 / layer.num_batches_tracked.to(variance.dtype)
    if isinstance(total, Tensor):
        share = share * moves.to(variance.dtype)
    fewer = (total - 1).clamp(min=1) if isinstance(total, Tensor) else total - 1
    unbiased = variance * total / fewer
    with torch.no_grad():
        for running, value in ((layer.running_mean, mean), (layer.running_var, unbiased)):
            running.lerp_(value.to(running.dtype), share)
