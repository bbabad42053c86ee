"""What would happen without doing it? A model and its optimizer on tensors that have a shape and no memory."""

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from wholebatch.core.tree import map_leaves
from wholebatch.engine.device import modules


def held(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Where a module holds tensors."""
    return module._parameters, module._buffers, module.__dict__


class Fakes:
    """Stand-ins for real tensors: the same shapes, dtypes, devices and sharing, and nothing behind them.

    Attributes:
        mode: The context in which operations compute shapes only.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """Return the stand-in of a tensor: always the same one."""
        if id(tensor) not in self._known:
            fake: Tensor = self.mode.from_tensor(tensor.detach(), static_shapes=True)
            if isinstance(tensor, nn.Parameter):
                with self.mode:
                    fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            self._known[id(tensor)] = tensor, fake
        return self._known[id(tensor)][1]

    @contextmanager
    def within(self, model: nn.Module) -> Iterator[None]:
        """Put stand-ins into a model, wherever it holds a parameter, a buffer or another tensor, and take them out.

        Args:
            model: The module itself, since a loss function may hold on to it.
        """
        kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
        log = logging.getLogger("torch._subclasses.fake_tensor")
        unheard, log.disabled = log.disabled, True  # it tells of an error that whoever looks ahead deals with
        try:
            for module in modules(model):
                for names in held(module):
                    kept.append((names, dict(names)))
                    for name, value in list(names.items()):
                        if isinstance(value, Tensor):
                            names[name] = self.of(value)
                        elif isinstance(value, list) and value and all(isinstance(each, Tensor) for each in value):
                            names[name] = [self.of(each) for each in value]  # recurrent layers list their weights
            yield
        finally:
            log.disabled = unheard
            for names, before in kept:
                names.clear()
                names.update(before)


def stand_in(optimizer: Optimizer, only: Tensor | None = None) -> Optimizer:
    """Return an optimizer of the same kind, settings and state, whose tensors are on the device ``meta``.

    Args:
        optimizer: Stays as it is.
        only: One of its parameters: then the other is made for it alone, on real zeros, which can be read.

    Raises:
        TypeError: It holds another optimizer, which would be the real one, or something that cannot be copied.
    """
    if any(isinstance(value, Optimizer) for value in vars(optimizer).values()):
        raise TypeError(f"{type(optimizer).__name__} holds another optimizer")
    known: dict[int, Tensor] = {}

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:  # counters are read, so they stay
            return leaf.clone() if isinstance(leaf, Tensor) else leaf
        if id(leaf) not in known:
            new = torch.empty_like(leaf, device="meta") if only is None else torch.zeros_like(leaf)
            known[id(leaf)] = new.requires_grad_(leaf.requires_grad)
        return known[id(leaf)]

    other: Optimizer = object.__new__(type(optimizer))
    other.__dict__.update(optimizer.__dict__)
    for name, value in optimizer.__dict__.items():
        if isinstance(value, OrderedDict):  # hooks are the user's, and have nothing to do with a stand-in
            other.__dict__[name] = OrderedDict()
        elif isinstance(value, dict | list | tuple | Tensor):  # what it keeps outside of its state is not to be shared
            other.__dict__[name] = map_leaves(of, value)
        elif isinstance(value, set | frozenset):
            other.__dict__[name] = type(value)(map(of, value))
        elif not (value is None or isinstance(value, bool | int | float | str | torch.dtype) or callable(value)):
            raise TypeError(f"{type(optimizer).__name__} keeps a {type(value).__name__}, {name}")
    other.param_groups = [
        {**group, "params": [of(each) for each in group["params"] if only is None or each is only]}
        for group in optimizer.param_groups
    ]
    for group in other.param_groups if only is None else ():
        if group.get("fused"):  # takes nothing for a moment, and no other device has it
            group.update(fused=False, foreach=False)
        elif group.get("foreach", 0) is None and optimizer.param_groups[0]["params"][0].device.type != "cpu":
            group["foreach"] = True  # what PyTorch chooses there
    other.state = defaultdict(dict)
    for parameter, state in optimizer.state.items():
        if only is not None and parameter is not only:
            continue
        other.state[of(parameter)] = {name: map_leaves(of, value) for name, value in state.items()}
    return other


def state_bytes(optimizers: Sequence[Optimizer], device_type: str) -> int:
    """Return what the states of optimizers take on a device. Unit: bytes."""
    total = 0
    for each in optimizers:
        for state in each.state.values():
            for value in state.values():
                if isinstance(value, Tensor) and value.device.type == device_type:
                    total += value.numel() * value.element_size()
    return total
