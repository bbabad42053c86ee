"""Which layers see the cut, and what is done about it?

Batch norm in training mode normalises with the mean and variance of the rows that it is given. In a window of several
micro-batches these are not the rows of the logical batch, so neither the gradient nor the running statistics are
those of the undivided batch.
"""

from typing import Any, Literal, Self, SupportsIndex, TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from wholebatch.core.errors import BatchNormError
from wholebatch.engine.device import modules
from wholebatch.engine.meetings.exactnorm import is_exact, require_module

Module = TypeVar("Module", bound=nn.Module)


def batch_dependent_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers that would compute otherwise on a part of the batch.

    Batch norm of every kind in training mode (or without running statistics, which is the same), and any other layer in
    training mode that keeps running statistics of its input.

    Args:
        model: The model as it is now; frozen and evaluating layers are left out.

    Example:
        >>> batch_dependent_layers(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
        ['1']
    """
    return [name or type(layer).__name__ for name, layer in model.named_modules() if _depends(layer)]


def require_row_by_row(model: nn.Module) -> None:
    """Raise an error that names the batch-dependent layers and the answers to them, if there are any.

    Args:
        model: A model whose logical batch is cut.

    Raises:
        BatchNormError: A layer would compute otherwise on a part of the batch.
    """
    if not any(map(_depends, modules(model))):
        return
    layers = batch_dependent_layers(model)
    shown = ", ".join(layers[:5]) + (f" and {len(layers) - 5} more" if len(layers) > 5 else "")
    if not any(isinstance(layer, _BatchNorm) and _depends(layer) for layer in modules(model)):
        raise BatchNormError(
            "The logical batch is cut into micro-batches, and in training mode these layers keep running statistics of "
            f"the rows that they are given, which would not be those of the whole batch: {shown}.",
            hint="they are no batch norm that is known here: make instance norm with track_running_stats=False, and "
            "let a layer of your own sum over the whole logical batch (wb.sum_over_batch); "
            'batch_norm="per_micro_batch" takes them as they are.',
        )
    raise BatchNormError(
        "The logical batch is cut into micro-batches, and in training mode these layers compute over the rows that "
        f"they are given, so that the update would not be that of the whole batch: {shown}.",
        hint="let them compute over the whole logical batch with wb.exact_batch_norm(model), replace them with "
        'wb.convert_batch_norm(model, to="group"), keep their statistics fixed with wb.freeze_batch_norm(model), '
        'or accept statistics of parts with batch_norm="per_micro_batch".',
    )


_FEW = 8
"""Fewer values than these say too little about their mean and variance."""


def convert_batch_norm(
    model: Module, to: Literal["group", "layer", "instance"] = "group", *, groups: int = 32
) -> Module | nn.GroupNorm:
    """Replace batch norm by a normalisation of each row for itself, which no cut can change.

    All three are group norm: over `groups` groups of channels (``"group"``), over all channels at once (``"layer"``),
    or over each channel alone (``"instance"``). The affine weights are the same parameters as before, so an optimizer
    that holds them goes on stepping them; running statistics are left behind.

    Args:
        model: Changed in place. Any module; batch norm is found at every depth.
        to: What to put in its place.
        groups: Groups of channels for ``"group"``; where it does not divide the channels of a layer, the next smaller
            number that does. `BatchNorm1d`, which may see single vectors, gets groups of 8 channels or more: of one
            value alone nothing would be left.

    Returns:
        The model, or its replacement where `model` is itself a batch norm layer.

    Raises:
        BatchNormError: `model` is no module, `to` is none of the three, or a lazy layer does not know its channels yet.

    Example:
        >>> convert_batch_norm(nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48)))[1].num_groups
        24

    Source: Wu and He, Group Normalization, arXiv 1803.08494.
    """
    if to not in ("group", "layer", "instance"):
        raise BatchNormError(
            f"to={to!r} is no normalisation to convert batch norm to.",
            hint='pass to="group", to="layer" or to="instance".',
        )
    replaced: dict[nn.Module, nn.GroupNorm] = {}

    def replacement(layer: _BatchNorm) -> nn.GroupNorm:
        if layer not in replaced:
            wanted = {"group": groups, "layer": 1, "instance": layer.num_features}[to]
            if to == "group" and isinstance(layer, nn.BatchNorm1d):
                wanted = min(groups, max(1, layer.num_features // _FEW))
            number = next(n for n in range(min(wanted, layer.num_features), 0, -1) if layer.num_features % n == 0)
            norm = nn.GroupNorm(number, layer.num_features, eps=layer.eps, affine=layer.affine)
            if layer.affine:
                norm.weight, norm.bias = layer.weight, layer.bias
            if number == layer.num_features and isinstance(layer, nn.BatchNorm1d):
                norm.register_forward_pre_hook(_require_several_values)
            replaced[layer] = norm.train(layer.training)
        return replaced[layer]

    _require_channels(model)
    if isinstance(model, _BatchNorm):
        return replacement(model)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, _BatchNorm):
                setattr(parent, name, replacement(child))
    return model


def _require_several_values(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Refuse rows that have a single value a channel: less its mean, nothing is left of it."""
    if inputs and inputs[0].ndim == 2:
        raise BatchNormError(
            f"Each row of {tuple(inputs[0].shape)} has a single value a channel, and batch norm was converted to "
            f"{norm.num_groups} groups of one channel each, which normalise it to 0.",
            hint='convert layers that see single vectors with to="group" or to="layer".',
        )


def freeze_batch_norm(model: Module) -> Module:
    """Let batch norm use its running statistics for good, also after ``model.train()``.

    The layers stay where they are, with their weights, their names and their place in the state dict; the affine
    weights go on learning. Right for a pre-trained model, whose statistics are worth keeping.

    Args:
        model: Changed in place.

    Returns:
        The model.

    Raises:
        BatchNormError: `model` is no module, or a layer keeps no running statistics, or has not seen a batch yet.

    Example:
        >>> model = freeze_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))).train()
        >>> batch_dependent_layers(model)
        []
    """
    _require_channels(model)
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and not isinstance(layer, _Frozen):
            if layer.running_mean is None:
                raise BatchNormError(
                    f"Batch norm {name or type(layer).__name__} keeps no running statistics that could be frozen.",
                    hint='convert it instead: wb.convert_batch_norm(model, to="group").',
                )
            object.__setattr__(layer, "__class__", _frozen(type(layer)))
            layer.eval()
    return model


class _Frozen(nn.Module):
    """Mixed into a batch norm layer: training mode does not reach it."""

    is_frozen = True

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        return super().train(False)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        thawed = next(kind for kind in type(self).__mro__[2:] if not issubclass(kind, _Frozen))
        return _unpickle, (thawed,), *super().__reduce_ex__(protocol)[2:]


class FrozenBatchNorm1d(_Frozen, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` with its running statistics fixed by `freeze_batch_norm`."""


class FrozenBatchNorm2d(_Frozen, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with its running statistics fixed by `freeze_batch_norm`."""


class FrozenBatchNorm3d(_Frozen, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` with its running statistics fixed by `freeze_batch_norm`."""


class FrozenSyncBatchNorm(_Frozen, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` with its running statistics fixed by `freeze_batch_norm`."""


_FROZEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
    nn.SyncBatchNorm: FrozenSyncBatchNorm,
}


def _unpickle(kind: type[nn.Module]) -> nn.Module:
    frozen = _frozen(kind)
    return frozen.__new__(frozen)


def _frozen(kind: type[nn.Module]) -> type[nn.Module]:
    """The frozen kind of a layer; for a subclass that somebody else wrote it is made here."""
    if kind not in _FROZEN:
        _FROZEN[kind] = type(f"Frozen{kind.__name__}", (_Frozen, kind), {"__module__": kind.__module__})
    return _FROZEN[kind]


def _depends(layer: nn.Module) -> bool:
    if is_exact(layer):
        return False
    if isinstance(layer, _BatchNorm) and layer.running_mean is None:
        return True
    # Instance norm treats each row for itself, but its running statistics are those of the batch.
    buffers = layer._buffers  # that of a scripted module has no `get`
    return layer.training and "running_mean" in buffers and buffers["running_mean"] is not None


def _require_channels(model: nn.Module) -> None:
    require_module(model)
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and isinstance(layer, _LazyNormBase) and layer.has_uninitialized_params():
            raise BatchNormError(
                f"Batch norm {name or type(layer).__name__} is lazy and does not know its channels yet.",
                hint="run the model on one batch first.",
            )
