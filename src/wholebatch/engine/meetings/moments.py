"""What did a micro-batch find when it went on? Random state and buffers, kept so that a second pass finds the same."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wholebatch.engine.device import modules
from wholebatch.engine.randomness import RandomState
from wholebatch.engine.transaction import Attributes, Transaction, alike, attributes_of, put_back_attributes


class Moments:
    """Random state and buffers before each piece of a forward pass, from one meeting to the next.

    What has not changed since the piece before is kept once. The running statistics of batch norm in training mode are
    left out: nothing in a forward pass depends on them.

    Args:
        model: Whose buffers are kept.
        device: Whose random stream is kept, besides those of the CPU.
        transaction: Holds copies of the buffers as they are at the beginning.
    """

    def __init__(self, model: nn.Module, device: torch.device, transaction: Transaction) -> None:
        self._device = device
        self._transaction = transaction
        self._random: dict[tuple[int, int], RandomState] = {}
        self._last_random: RandomState | None = None
        self._drawn = False
        self._buffers: dict[tuple[int, int], tuple[Tensor | None, ...]] = {}
        self._modules = modules(model)
        self._attributes: dict[tuple[int, int], Attributes] = {}
        self._replaced: set[int] = set()
        self._watched = [
            (module, name)
            for module in self._modules
            if not (isinstance(module, _BatchNorm) and module.training)
            for name, buffer in module._buffers.items()
            if buffer is not None and not buffer.is_inference()
        ]
        # The tensors themselves, not their ids: the next tensor may stand where the last one stood.
        self._seen = [(module._buffers[name], _version(module._buffers[name])) for module, name in self._watched]
        self._copies: tuple[Tensor | None, ...] = (None,) * len(self._watched)
        self._changed: set[int] = set()

    def keep(self, number: int, piece: int) -> None:
        """Keep what a micro-batch finds before a piece of its forward pass.

        Args:
            number: Of the micro-batch.
            piece: How often it has met.
        """
        now, last = RandomState.now(self._device), self._last_random
        if last is not None:
            now = _shared(now, last)
            self._drawn = self._drawn or now is not last
        self._last_random = self._random[number, piece] = now
        copies: list[Tensor | None] | None = None
        for place, (module, name) in enumerate(self._watched):
            buffer = _buffer(module, name)
            seen, version = self._seen[place]
            if buffer is not seen or _version(buffer) != version:
                self._seen[place] = buffer, _version(buffer)
                self._changed.add(place)
                if buffer is not seen:
                    self._replaced.add(place)
                copies = list(self._copies) if copies is None else copies
                copies[place] = None if buffer is None else buffer.detach().clone()
        if copies is not None:
            self._copies = tuple(copies)
        self._buffers[number, piece] = self._copies
        if self._replaced:
            self._attributes[number, piece] = attributes_of(self._modules)

    def restore(self, number: int, piece: int) -> None:
        """Let a micro-batch find what it found before."""
        if self._drawn:
            self._random[number, piece].restore()
        kept = self._buffers[number, piece]
        if self._replaced:
            put_back_attributes(self._attributes.get((number, piece), self._transaction.attributes))
        for place in self._changed:
            module, name = self._watched[place]
            buffer = _buffer(module, name)
            copy = kept[place]
            if copy is None:  # it had not changed yet
                copy = self._transaction.copy_of_buffer(module, name)
            # A graph may hold on to what is there.
            if place in self._replaced or buffer is None or copy is None or not alike(buffer, copy):
                module._buffers[name] = None if copy is None else copy.clone()
            else:
                if buffer.requires_grad:  # moved by what a meeting came to, which has a graph in the first pass
                    buffer.detach_()
                with torch.no_grad():
                    buffer.copy_(copy)


def _version(buffer: Tensor | None) -> int:
    return -1 if buffer is None or buffer.is_inference() else buffer._version


def _shared(now: RandomState, before: RandomState) -> RandomState:
    """The same random state, in the memory of another one where both agree."""
    same_cpu = torch.equal(now.cpu, before.cpu)
    same_python = now.python == before.python
    same_device = (now.on_device is None) == (before.on_device is None) and (
        now.on_device is None or before.on_device is None or torch.equal(now.on_device, before.on_device)
    )
    if same_cpu and same_python and same_device and now.numpy is before.numpy:
        return before
    return replace(
        now,
        cpu=before.cpu if same_cpu else now.cpu,
        on_device=before.on_device if same_device else now.on_device,
        python=before.python if same_python else now.python,
    )


def _buffer(module: nn.Module, name: str) -> Tensor | None:
    buffers = module._buffers
    return buffers[name] if name in buffers else None  # noqa: SIM401 - that of a scripted module has no `get`
