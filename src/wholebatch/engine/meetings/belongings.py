"""What has a micro-batch put into the modules of a model? It is there while that micro-batch runs, and no longer.

A forward pass leaves tensors behind for its own later use: an auxiliary loss in an attribute, features that a hook puts
into a dict, other weights that `torch.func.functional_call` puts in place until it returns. Where micro-batches meet on
the way, each would find what the others have left.
"""

import inspect
from collections.abc import Iterable, Iterator
from types import CellType
from typing import Any, NamedTuple

from torch import Tensor, nn

from wholebatch.engine.device import OF_EVERY_MODULE, modules

_MISSING = object()
_EMPTY = CellType()


class _Left(NamedTuple):
    """An entry of a dict, or all entries of a list, which has no names."""

    place: Any
    name: Any
    value: Any

    def give(self) -> None:
        if isinstance(self.place, list):
            self.place[:] = self.value
        elif self.value is _MISSING:
            self.place.pop(self.name, None)
        else:
            self.place[self.name] = self.value


class Belongings:
    """Tensors in attributes, among the weights, and in what hooks fill, as each micro-batch has left them.

    Whether something is left at a meeting is looked up in micro-batch 0, since all run the same code. Buffers are not
    meant: what one micro-batch does to them, all see.

    Args:
        model: Whose modules they are.
    """

    def __init__(self, model: nn.Module) -> None:
        found = modules(model)
        self._attributes: list[dict[str, Any]] = [each.__dict__ for each in found]
        self._others = [each._parameters for each in found if type(each._parameters) is dict and each._parameters]
        self._others += [each for module in found for each in _filled_by_hooks(module)]
        self._usual: list[tuple[Any, Any]] = []
        self._are_left = False
        self._left: dict[int, list[_Left]] = {}

    def go_on(self, number: int) -> None:
        """Give a micro-batch what it had left when it came to its last meeting."""
        if number == 0 or self._are_left:
            places = {id(each): each for each in (*self._attributes, *self._others, *self._containers())}
            self._usual = [(each, each.copy()) for each in places.values()]
        for each in self._left.pop(number, ()):
            each.give()

    def come(self, number: int) -> None:
        """Take what a micro-batch has left that has come to a meeting."""
        if number and not self._are_left:
            return
        left = []
        for place, usual in self._usual:
            for name, now, before in _changes(place, usual):
                left.append(_Left(place, name, now))
                _Left(place, name, before).give()
        if number == 0:
            self._are_left = bool(left)
        if left:
            self._left[number] = left

    def _containers(self) -> Iterator[Any]:
        for attributes in self._attributes:
            for name, value in attributes.items():
                if type(value) in (dict, list) and name not in OF_EVERY_MODULE:
                    yield value


def _filled_by_hooks(module: nn.Module) -> Iterable[Any]:
    """Return the dicts that the hooks of a module see."""
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        function: Any = getattr(hook, "func", hook)  # of a partial function
        if inspect.ismethod(function):
            held = getattr(function.__self__, "__dict__", {})
            seen = [value for name, value in held.items() if name not in OF_EVERY_MODULE]
        elif inspect.isfunction(function):
            seen = [cell.cell_contents for cell in function.__closure__ or () if cell != _EMPTY]
            seen += [function.__globals__.get(name) for name in function.__code__.co_names]
        else:
            continue
        yield from (each for each in seen if type(each) is dict)


def _changes(place: Any, usual: Any) -> list[tuple[Any, Any, Any]]:
    """Return what has changed in a place, where a tensor has come or gone: name, value now, and value before."""
    if isinstance(place, list):
        is_same = len(place) == len(usual) and all(now is before for now, before in zip(place, usual, strict=True))
        return [] if is_same or not (_holds_tensor(place) or _holds_tensor(usual)) else [(None, place.copy(), usual)]
    if len(place) == len(usual) and all(
        now is before for now, before in zip(place.values(), usual.values(), strict=True)
    ):
        return []
    both = ((name, place.get(name, _MISSING), usual.get(name, _MISSING)) for name in {**usual, **place})
    return [
        (name, now, before)
        for name, now, before in both
        if now is not before and (_holds_tensor(now) or _holds_tensor(before))
    ]


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return isinstance(value, Tensor)
    return any(isinstance(each, Tensor) for each in value)
