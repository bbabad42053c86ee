"""Commit or roll back: random state and buffers as they were before a window.

Weights, optimizer state, loss scale and schedule need no copy: nothing touches them before the window is known to be
good. The gradient sum has its own beginning and end (`sums.py`).
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from wholebatch.engine.device import OF_EVERY_MODULE, modules
from wholebatch.engine.randomness import RandomState


class Transaction:
    """What a model's forward passes change, kept so that it can be undone.

    Buffers are copied before every window, into the same copies: a version counter would miss what goes through
    ``.data``. Where a pass has replaced one, the plain attributes of all modules go back with it.

    Args:
        model: Whose buffers are kept.
        device: Whose random stream is kept, besides those of the CPU.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._modules: list[nn.Module] = []
        self._begun = _Kept()
        self._marked = _Kept()
        self._point: _Kept | None = self._begun  # where the mark is; None where nothing moves
        self._fresh = True  # the first mark is where the window began
        self._draws = True
        self._writes: bool | None = None
        self._moves = False  # whether one of both did, although it had stood still

    def begin(self) -> None:
        """Keep random state and buffers as they are now."""
        before, versions = self._begun.random, self._begun.versions
        self._modules = modules(self._model)
        self._begun.take(self._modules, self._device)
        # What was still from one window to the next needs no mark in this one.
        self._draws = before is None or not self._begun.random_is(before)
        self._writes = self._writes or (None if self._writes is None else versions != self._begun.versions)
        self._fresh = True

    def mark(self) -> None:
        """Keep both once more, in the middle of a window, to come back to; as far as passes may have moved them."""
        if self._fresh:
            self._fresh, self._point = False, self._begun
        elif self._moves or self._draws or self._writes is not False:
            self._marked.take(self._begun.modules, self._device)
            self._point = self._marked
            if self._writes is None:  # the first time, by their values, since writing through ``.data`` has no version
                self._writes = not self._marked.holds_the_same_buffers(self._begun)
        else:
            self._point = None

    def copy_of_buffer(self, module: nn.Module, name: str) -> Tensor | None:
        """Return what a buffer held at `begin`, or None if it was not there. To be read, not changed."""
        return self._begun.copy_of(module, name)

    @property
    def attributes(self) -> "Attributes":
        """What modules had as plain attributes at `begin`."""
        return self._begun.attributes

    def state_dict(self) -> dict[str, Any]:
        """Return random state and buffers as they were at `begin`."""
        assert self._begun.random is not None
        buffers = {
            f"{path}.{name}": self._begun.copy_of(module, name)
            for path, module in self._model.named_modules()
            for name in module._buffers.keys()  # noqa: SIM118 - that of a scripted module cannot be gone through
        }
        return {"random": self._begun.random.state_dict(), "buffers": buffers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to these instead of to those at `begin`; a mark is still where it is made."""
        self._fresh, self._draws = False, True
        self._begun.random = RandomState.of(state["random"], self._device)
        for path, module in self._model.named_modules():
            for name in module._buffers.keys():  # noqa: SIM118
                copy, saved = self._begun.copy_of(module, name), state["buffers"].get(f"{path}.{name}")
                if copy is not None and alike(saved, copy):
                    copy.copy_(saved)

    def roll_back(self) -> None:
        """Put random state and buffers back to where they were at `begin`."""
        self._begun.put_back(self._modules)

    def roll_back_to_mark(self) -> bool:
        """Put both back to where they were at `mark`; return False if they have moved although nothing was marked."""
        if self._point is None:
            self._moves = not self._begun.stands()
            return not self._moves
        self._point.put_back(self._modules)
        return True

    def roll_back_random(self) -> None:
        """Put the random streams back to where they were at `begin`, and leave buffers as they are."""
        if self._begun.random is not None:
            self._begun.random.restore()

    def roll_back_buffers(self) -> None:
        """Put buffers back to where they were at `begin`, and let the random streams go on."""
        self._begun.put_back_buffers(self._modules)


class _Kept:
    """Random state and buffers at one moment, in copies that are used again for the next.

    Attributes:
        modules: Those of the model.
        random: The random state; None before the first moment.
        versions: How often each buffer had been written.
        attributes: What they had besides; see `attributes_of`.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.random: RandomState | None = None
        self._buffers: dict[nn.Module, dict[str, Tensor | None]] = {}
        self.attributes: Attributes = {}
        self._copies: dict[int, Tensor] = {}
        self.versions: list[int] = []

    def random_is(self, other: RandomState) -> bool:
        """Whether every stream stands where it stood at another moment."""
        mine = self.random
        return (
            mine is not None
            and mine.python is other.python
            and mine.numpy is other.numpy
            and torch.equal(mine.cpu, other.cpu)
            and (
                mine.on_device is None or (other.on_device is not None and torch.equal(mine.on_device, other.on_device))
            )
        )

    def holds_the_same_buffers(self, other: "_Kept") -> bool:
        """Whether every buffer had the same values at another moment."""
        return self._copies.keys() == other._copies.keys() and all(
            torch.equal(copy, other._copies[key]) for key, copy in self._copies.items()
        )

    def take(self, modules: list[nn.Module], device: torch.device) -> None:
        self.random = RandomState.now(device)
        self.modules = modules
        self._buffers = {module: dict(module._buffers) for module in modules if module._buffers}
        self.attributes = attributes_of(modules)
        there = {id(each): each for held in self._buffers.values() for each in held.values() if each is not None}
        self.versions = list(map(_version, there.values()))
        if there.keys() == self._copies.keys() and all(map(alike, there.values(), map(self._copies.get, there))):
            if there:
                with torch.no_grad():
                    torch._foreach_copy_([self._copies[key] for key in there], list(there.values()))
            return
        self._copies = {key: buffer.detach().clone() for key, buffer in there.items()}

    def stands(self) -> bool:
        """Whether nothing was drawn or written since."""
        there = {id(each): each for held in self._buffers.values() for each in held.values() if each is not None}
        return self.random is not None and self.random.stands() and self.versions == list(map(_version, there.values()))

    def copy_of(self, module: nn.Module, name: str) -> Tensor | None:
        buffer = self._buffers.get(module, {}).get(name)
        return None if buffer is None else self._copies[id(buffer)]

    def put_back(self, modules: list[nn.Module]) -> None:
        if self.random is not None:
            self.random.restore()
            self.put_back_buffers(modules)

    def put_back_buffers(self, modules: list[nn.Module]) -> None:
        if any(self._is_replaced(module) for module in modules):
            put_back_attributes(self.attributes)
        for module in modules:
            buffers = self._buffers.get(module, {})
            for name in [name for name in module._buffers.keys() if name not in buffers]:  # noqa: SIM118
                del module._buffers[name]
            for name, buffer in buffers.items():
                if buffer is not None and buffer.is_inference():  # it takes no changes; its copy is as good
                    module._buffers[name] = self._copies[id(buffer)]
                    continue
                if buffer is not None:
                    copy = self._copies[id(buffer)]
                    if not alike(buffer, copy):
                        buffer.data = copy.clone()
                    with torch.no_grad():
                        buffer.copy_(copy)
                module._buffers[name] = buffer

    def _is_replaced(self, module: nn.Module) -> bool:
        """Whether a module has another buffer than it had, or one that has grown."""
        before = self._buffers.get(module, {})
        return any(
            then is not now or not (now is None or alike(now, self._copies[id(now)]))
            for name, now in module._buffers.items()
            for then in [before.get(name)]
        )


def attributes_of(modules: Iterable[nn.Module]) -> "Attributes":
    """Return what modules that are not PyTorch's own keep as plain attributes.

    A buffer that a forward pass replaces, such as a table of positions that grows with the longest text, comes with
    others that say what is in it: both have to go back together. A tensor with a graph is not held on to.
    """
    return {
        module: {name: _LEFT if _has_graph(held[name]) else held[name] for name in held.keys() - OF_EVERY_MODULE}
        for module in modules
        if not type(module).__module__.startswith("torch.")
        for held in [vars(module)]
    }


def put_back_attributes(kept: "Attributes") -> None:
    """Make the plain attributes of modules what they were."""
    for module, attributes in kept.items():
        held = vars(module)
        for name in held.keys() - attributes.keys() - OF_EVERY_MODULE:
            del held[name]
        held.update((name, value) for name, value in attributes.items() if value is not _LEFT)


Attributes: TypeAlias = dict[nn.Module, dict[str, Any]]
"""The plain attributes of modules at one moment."""

_LEFT = object()


def _has_graph(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def _version(buffer: Tensor) -> int:
    return -1 if buffer.is_inference() else buffer._version


def alike(buffer: Tensor | None, copy: Tensor | None) -> bool:
    """Whether a buffer can be copied into its last copy."""
    return copy is not None and buffer is not None and copy.shape == buffer.shape and copy.dtype is buffer.dtype
