"""What is there beside the passes? Weights, buffers, the optimizer's state, and what its step takes."""

from collections.abc import Iterable

import torch
from torch import Tensor

from wholebatch.engine.fit.fakes import state_bytes
from wholebatch.engine.fit.optimizing import step_need
from wholebatch.engine.narrow import SumIn, own_sums
from wholebatch.engine.setup import Setup
from wholebatch.engine.steps.consuming import consumed_by
from wholebatch.engine.steps.stepping import copy_bytes


def held_bytes(setup: Setup) -> int:
    """Return what is there already of what training takes: weights, buffers and the optimizer's state. Unit: bytes."""
    tensors = [*setup.model.parameters(), *setup.model.buffers()]
    return _bytes(tensors, setup.device) + state_bytes(setup.optimizers, setup.device.type)


def weight_sizes(setup: Setup) -> set[int]:
    """Return the sizes of weights, and of their copies in 16 and 32 bits. Unit: bytes."""
    return {each.numel() * size for each in setup.model.parameters() for size in (2, 4, each.element_size())}


def beside_passes(setup: Setup, sum_in: SumIn, reasons: list[str]) -> tuple[dict[str, int], int]:
    """Return what is there all the time, by name, and what the end of a window takes above that. Unit: bytes.

    Args:
        setup: Model and optimizers.
        sum_in: How 16-bit gradients are summed.
        reasons: Takes what could not be looked at as it should, and why.
    """
    model, device = setup.model, setup.device
    weights = _bytes(model.parameters(), device)
    buffers = 2 * _bytes(model.buffers(), device)  # a window keeps a copy
    if device.type == "cpu":  # and one of the random state, besides its loss
        buffers += torch.get_rng_state().numel() + 4
    consumed = consumed_by(setup.optimizers)
    learning = [each for each in model.parameters() if each.requires_grad and each not in consumed]
    gradients = _bytes(learning, device)
    summed = own_sums([each for each in setup.parameters if each not in consumed], sum_in)
    sums = sum(own.bytes_each * each.numel() for each, own in summed.items())
    largest = max((each.numel() * each.element_size() for each in learning), default=0)
    state, temporary = step_need(setup.optimizers, device, gradients, reasons)
    through, copied = copy_bytes(setup.optimizers, state)
    resident = {"weights": weights, "buffers": buffers + through, "optimizer state": state}
    return resident, max(gradients + temporary + copied, sums + largest if sums else 0)


def _bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """What tensors take on a device, shared memory once. Unit: bytes."""
    storages = {
        (each.untyped_storage().data_ptr(), each.untyped_storage().nbytes())
        for each in tensors
        if each.device.type == device.type and each.layout == torch.strided
    }
    return sum(size for _, size in storages)
