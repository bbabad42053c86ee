"""What does a pass leave behind that the next one sees? Buffers that it changes, and that the loss reads.

In a cut batch a micro-batch then sees what the one before it left, and an update moves them once for each.
"""

import torch
from torch import Tensor
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from wholebatch.core.split import Indices
from wholebatch.engine.batchnorm import batch_dependent_layers
from wholebatch.engine.checks.pieces import Probe
from wholebatch.engine.checks.silence import silenced
from wholebatch.engine.device import input_device
from wholebatch.engine.meetings.exactnorm import exact_layers
from wholebatch.engine.transaction import Transaction


def carried(probe: Probe, whole: Indices) -> list[str]:
    """Return the buffers that a pass changes, by name, if the gradient of the next pass depends on it.

    Batch norm and spectral norm are left out: both are looked after, or known, elsewhere.

    Args:
        probe: Runs the rows.
        whole: The undivided rows.
    """
    transaction = Transaction(probe.model, input_device(probe.model))
    transaction.begin()
    with silenced(probe.model):
        first = _gradient(probe, whole)
        moved = _moved(probe, transaction)
        if first is None or not moved:
            return []
        transaction.roll_back_random()
        after = _gradient(probe, whole)
        transaction.roll_back()
        again = _gradient(probe, whole)
    transaction.roll_back()
    if after is None or again is None:
        return []
    bound = probe.tolerance * float(first.norm())
    is_reproduced = float((again - first).norm()) <= bound
    return moved if is_reproduced and float((after - first).norm()) > bound else []


def _gradient(probe: Probe, whole: Indices) -> Tensor | None:
    piece = probe.run(whole)
    return None if piece is None else piece.gradient


def _moved(probe: Probe, transaction: Transaction) -> list[str]:
    """The buffers that are not what they were when the transaction began."""
    known = {*batch_dependent_layers(probe.model), *exact_layers(probe.model)}
    moved = []
    for name, module in probe.model.named_modules():
        hooks = module._forward_pre_hooks.values()
        if (
            name in known
            or isinstance(module, _SpectralNorm)
            or any(isinstance(getattr(hook, "hook", hook), SpectralNorm) for hook in hooks)
        ):
            continue
        for key, buffer in module._buffers.items():
            before = transaction.copy_of_buffer(module, key)
            if buffer is not None and (before is None or not _same(before, buffer)):
                moved.append(f"{name}.{key}" if name else key)
    return moved


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
