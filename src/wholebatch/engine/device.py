"""Where does a model take its input, how does a micro-batch get there, and which modules meet it?"""

from typing import Any

import torch
from torch import Tensor, nn

from wholebatch.core.tree import map_leaves


def input_device(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter; the CPU if it has none."""
    first = next(iter(model.parameters()), None)
    return first.device if first is not None else torch.device("cpu")


OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""The attributes that modules have as PyTorch makes them; others are their own."""


def modules(model: nn.Module) -> list[nn.Module]:
    """Return a model and all modules below it, as ``model.modules()`` does, in a fraction of its time."""
    found: dict[int, nn.Module] = {}
    ahead: list[nn.Module | None] = [model]
    while ahead:
        module = ahead.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            ahead.extend(module._modules.values())
    return list(found.values())


def move(micro_batch: Any, device: torch.device) -> Any:
    """Return a micro-batch on a device; copies to an accelerator are queued and do not wait.

    Args:
        micro_batch: A pytree; leaves that are no tensors stay as they are.
        device: Where to. A batch for the CPU is returned as it is.
    """
    if device.type == "cpu":
        return micro_batch

    def move_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.device == device:
            return leaf
        if device.type == "cuda" and leaf.device.type == "cpu":
            leaf = leaf.pin_memory()
        return leaf.to(device, non_blocking=True)

    return map_leaves(move_leaf, micro_batch)
