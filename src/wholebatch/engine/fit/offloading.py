"""Where do activations wait? In the host's memory, where a device has one of its own and nothing else helps."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

HOSTED = frozenset({"cuda", "xpu"})
"""Devices with a memory of their own, between which and the host's copies run beside the computation."""


def offload(model: nn.Module) -> bool:
    """Let what the forward pass of a model keeps for its backward pass wait in the host's memory.

    Weights and buffers stay where they are. It costs two copies of each activation, and changes no number.

    Args:
        model: Changed in place; `bring_back` takes it back.

    Returns:
        Whether it did not before.
    """
    if isinstance(model.__dict__.get("forward"), _Offloaded):
        return False
    model.forward = _Offloaded(model)
    return True


def bring_back(model: nn.Module) -> None:
    """Take back what `offload` did."""
    ours = model.__dict__.get("forward")
    if isinstance(ours, _Offloaded):
        ours.leave()


@contextmanager
def offloading(model: nn.Module) -> Iterator[None]:
    """Offload for a while, unless it is done already."""
    did = offload(model)
    try:
        yield
    finally:
        if did:
            bring_back(model)


def on_the_host(model: nn.Module) -> AbstractContextManager[Any]:
    """Return the context in which what is saved for the backward pass goes to the host's memory, but for weights."""
    parameters = list(model.parameters())
    device = next((each.device for each in parameters), torch.device("cpu"))
    fake = any(isinstance(each, torch._subclasses.FakeTensor) for each in parameters[:1])
    host = save_on_cpu(pin_memory=device.type in HOSTED and not fake, device_type=device.type)
    held = {_place(each) for each in (*parameters, *model.buffers())}

    def pack(tensor: Tensor) -> Any:
        if tensor.device.type != device.type or _place(tensor) in held:
            return tensor
        return host.pack_hook(tensor)

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else host.unpack_hook(packed)

    return saved_tensors_hooks(pack, unpack)


def _place(tensor: Tensor) -> int:
    place: int = tensor.untyped_storage()._cdata
    return place


class _Offloaded:
    """The forward method of a model that offloads. A class of its own, so that a model can still be copied."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._own = model.__dict__.get("forward")

    def leave(self) -> None:
        """Give the model back the forward method that it had."""
        del self._model.forward
        if self._own is not None:
            self._model.forward = self._own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with on_the_host(self._model):
            if self._own is not None:
                return self._own(*args, **kwargs)
            return type(self._model).forward(self._model, *args, **kwargs)
