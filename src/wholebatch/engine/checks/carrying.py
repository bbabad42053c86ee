"""What does a pass leave behind for the next one? Buffers, attributes and weights that it changes, and that it reads.

In a cut batch a micro-batch then sees what the one before it left, and an update moves them once for each.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from wholebatch.core.split import Indices
from wholebatch.engine.batchnorm import batch_dependent_layers
from wholebatch.engine.checks.pieces import Probe
from wholebatch.engine.checks.silence import silenced
from wholebatch.engine.device import input_device
from wholebatch.engine.meetings.exactnorm import exact_layers
from wholebatch.engine.ranks.shares import local_of
from wholebatch.engine.transaction import Transaction


def carried(probe: Probe, whole: Indices) -> list[str]:
    """Return what a pass changes in the model, by name, if the gradient of the next pass depends on it.

    Batch norm and spectral norm are left out: both are looked after, or known, elsewhere.

    Args:
        probe: Runs the rows.
        whole: The undivided rows.
    """
    transaction = Transaction(probe.model, input_device(probe.model))
    transaction.begin()
    attributes = _Attributes(probe.model)
    parameters = dict(probe.model.named_parameters())
    written = _written(parameters.values())
    try:
        with silenced(probe.model):
            first = _gradient(probe, whole)
            moved = sorted(_moved_buffers(probe, transaction) + attributes.moved())
            now = _written(parameters.values())
            weights = [name for name, then, mark in zip(parameters, written, now, strict=True) if then != mark]
            if first is None or not (moved or weights):
                return []
            transaction.roll_back_random()
            after = _gradient(probe, whole)
            transaction.roll_back()
            attributes.put_back()
            again = _gradient(probe, whole)
    finally:
        transaction.roll_back()
        attributes.put_back()
    if after is None or again is None:
        return []
    bound = probe.tolerance * float(first.norm())
    if float((after - first).norm()) <= bound:
        return []
    # Weights are not put back, so that a gradient on them cannot be had again.
    return moved + weights if weights or float((again - first).norm()) <= bound else []


def _gradient(probe: Probe, whole: Indices) -> Tensor | None:
    piece = probe.run(whole)
    return None if piece is None else piece.gradient


def _written(parameters: Iterable[nn.Parameter]) -> list[Any]:
    """What changes when a weight does, also through ``.data``, such as one that follows another and does not learn."""
    held = [(each._version, local_of(each.detach())) for each in parameters]
    return [
        (version, weight.data_ptr(), float(weight.sum()).hex() if weight.dtype in _ADDED_UP else None)
        for version, weight in held
    ]


_ADDED_UP = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _moved_buffers(probe: Probe, transaction: Transaction) -> list[str]:
    """The buffers that are not what they were when the transaction began."""
    known = {*batch_dependent_layers(probe.model), *exact_layers(probe.model)}
    moved = []
    for name, module in probe.model.named_modules():
        if name in known or is_spectral(module):
            continue
        for key, buffer in module._buffers.items():
            before = transaction.copy_of_buffer(module, key)
            if buffer is not None and (before is None or not _same(before, buffer)):
                moved.append(_named(name, key))
    return moved


def is_spectral(module: nn.Module) -> bool:
    """Return whether a layer divides weights by an estimate of their norm, which each pass in training improves."""
    hooks = module._forward_pre_hooks.values()
    return isinstance(module, _SpectralNorm) or any(isinstance(hook, SpectralNorm) for hook in hooks)


class _Attributes:
    """Numbers and tensors that the modules of a model keep as plain attributes, as they were at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self._kept: list[tuple[str, nn.Module, dict[str, Any], dict[str, Tensor]]] = []
        for name, module in model.named_modules():
            if is_spectral(module):
                continue
            held = {key: value for key, value in vars(module).items() if _is_kept(key, value)}
            copies = {key: value.detach().clone() for key, value in held.items() if isinstance(value, Tensor)}
            self._kept.append((name, module, held, copies))

    def moved(self) -> list[str]:
        """Return the names of those that are others now, or hold other values."""
        return [
            _named(name, key)
            for name, module, held, copies in self._kept
            for key, value in held.items()
            if not self._is_still(vars(module).get(key), value, copies.get(key))
        ]

    def put_back(self) -> None:
        """Make all what they were."""
        for _, module, held, copies in self._kept:
            for key, value in held.items():
                if key in copies and not _same(copies[key], value.detach()):
                    with torch.no_grad():
                        value.copy_(copies[key])
                vars(module)[key] = value

    @staticmethod
    def _is_still(now: Any, then: Any, copy: Tensor | None) -> bool:
        if isinstance(now, Tensor):
            return copy is not None and _same(copy, now.detach())
        return copy is None and type(now) is type(then) and now == then


def _is_kept(key: str, value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.layout is torch.strided and not value.requires_grad
    return (value is None or isinstance(value, int | float)) and key != "training" and not key.startswith("_")


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _named(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key
