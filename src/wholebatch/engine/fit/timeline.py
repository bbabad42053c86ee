"""Which tensors are live when? Every storage that an operation makes, from its first tensor to its last."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from wholebatch.core.trace import Kind, Trace
from wholebatch.core.tree import flatten
from wholebatch.engine.fit.operations import DEVICE, about, is_narrow


class OverBudget(Exception):  # noqa: N818 - ends a look ahead, and is no error of the user's
    """More would be live than was allowed."""


class Timeline(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors as operations make them and their last user lets go of them.

    Real tensors and fake ones look alike from here. What a kernel takes and gives back within one operation is not
    seen.

    Args:
        device: Whose memory is counted.
        limit: What may be live at once above what was there before; None: anything. Unit: bytes.

    Attributes:
        live_bytes: What is live now, above what was there before.
        peak_bytes: The most of it so far.
        hidden: Names of operations that are known to take memory of their own, as far as they came by.

    Raises:
        OverBudget: Inside the block: the limit was passed.

    Example:
        >>> with Timeline(torch.device("cpu")) as timeline:
        ...     x = torch.zeros(1000)
        ...     y = x[:10] + 1
        ...     del x
        >>> timeline.live_bytes, timeline.peak_bytes
        (40, 4040)
    """

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._type = device.type
        self._rounding = 512 if device.type in ("cuda", "xpu") else 1
        self._limit = limit
        self._live: dict[int, Any] = {}
        self._number: dict[int, int] = {}
        self._sizes: list[int] = []
        self._kinds: list[Kind] = []
        self._events: list[int] = []
        self._arrived: list[tuple[int, int | None]] = []
        self._second: int | None = None
        self.live_bytes = 0
        self.peak_bytes = 0
        self.hidden: set[str] = set()

    def __enter__(self) -> "Timeline":
        self._get_rng_state = torch.get_rng_state
        torch.get_rng_state = self._seen_rng_state
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        torch.get_rng_state = self._get_rng_state

    def _seen_rng_state(self) -> Tensor:
        """Return the random state, which no operation makes; a block that recomputes keeps one."""
        state = self._get_rng_state()
        self._see(state)
        return state

    def ignore(self, tree: Any) -> None:
        """Leave out tensors that were there before."""
        for tensor in _tensors(tree):
            self._ignore(tensor)

    def note(self, tree: Any, kind: Kind) -> None:
        """Count tensors that were made where this timeline did not look, and say what they are there for."""
        for tensor in _tensors(tree):
            self._see(tensor)
            self.mark([tensor], kind)

    def mark(self, tensors: Iterable[Tensor | None], kind: Kind) -> None:
        """Say what tensors are there for, as far as they are counted."""
        for tensor in tensors:
            if tensor is None:
                continue
            for part in _dense_parts(tensor):
                number = self._number.get(id(part.untyped_storage()))
                if number is not None:
                    self._kinds[number] = kind

    def mark_kept(self) -> None:
        """Say that whatever is live and has no other purpose is kept for the backward pass."""
        for number in self._number.values():
            if self._kinds[number] == "temporary":
                self._kinds[number] = "activations"

    def begin_second(self) -> None:
        """Say that the second micro-batch begins."""
        self._second = len(self._events)

    def arrived(self, parameter: Tensor) -> None:
        """Say that a gradient has just been added to that of a parameter, or has become it."""
        storage = parameter.grad.untyped_storage() if _is_dense(parameter.grad) else None
        self._arrived.append((len(self._events), self._number.get(id(storage))))

    def repeat(self) -> bool:
        """Add a second micro-batch that does what the first did, but finds the gradients of the first there.

        Each of its gradients is let go of where that of the first arrived: it is added to that one.

        Returns:
            False where the second cannot be told from the first, since more than gradients is left of it, or a gradient
            came in parts. Then nothing was added.
        """
        gradients = [number for _, number in self._arrived]
        if sorted(self._number.values()) != sorted(each for each in gradients if each is not None):
            return False
        if None in gradients or any(self._kinds[each] != "gradients" for each in self._number.values()):
            return False
        first, many = self._events[:], len(self._sizes)
        self.begin_second()
        self._sizes += self._sizes
        self._kinds += ["arriving" if each == "gradients" else each for each in self._kinds]
        ended = 0
        for place, number in [*self._arrived, (len(first), None)]:
            self._events += [each + many if each >= 0 else each - many for each in first[ended:place]]
            self._events += [~(number + many)] if number is not None else []
            ended = place
        return True

    def trace(self) -> Trace:
        """Return what came and went."""
        changes = tuple(self._sizes[each] if each >= 0 else -self._sizes[~each] for each in self._events)
        kinds = tuple(self._kinds[each if each >= 0 else ~each] for each in self._events)
        return Trace(changes, kinds, len(changes) if self._second is None else self._second)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is DEVICE and isinstance(args[0], FakeTensor) and not args[0].fake_mode.in_kernel_invocation:
            return args[0].fake_device  # what the mode beneath would say, which is asked more often than all else
        kwargs = kwargs or {}
        known = about(func)
        if known.views:
            for tensor in _among(args):
                self._ignore(tensor)
            if kwargs:
                for tensor in _among(kwargs.values()):
                    self._ignore(tensor)
        result = func(*args, **kwargs)
        if known.makes:
            if isinstance(result, Tensor):
                if not any(result is each for each in args):
                    self._see(result)
            else:
                for tensor in _among((result,)):
                    if not any(tensor is each for each in args):
                        self._see(tensor)
        if known.hidden or (known.product and is_narrow(args)):
            self.hidden.add(known.name)
        return result

    def _ignore(self, tensor: Tensor) -> None:
        for part in _dense_parts(tensor):
            storage = part.untyped_storage()
            if id(storage) not in self._live:
                live = self._live[id(storage)] = _Live(storage, self._forget)
                live.key = id(storage)

    def _forget(self, gone: "_Live") -> None:
        self._live.pop(gone.key, None)

    def _see(self, tensor: Tensor) -> None:
        for part in _dense_parts(tensor):
            storage = part.untyped_storage()
            if id(storage) in self._live:
                continue
            size = storage.nbytes()
            if size and part.device.type == self._type:
                self._take(storage, -(-size // self._rounding) * self._rounding)

    def _take(self, storage: Any, size: int) -> None:
        number = len(self._sizes)
        self._sizes.append(size)
        self._kinds.append("temporary")
        self._events.append(number)
        self.live_bytes += size
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
        live = self._live[id(storage)] = _Live(storage, self._give_back)
        live.key = id(storage)
        live.number = self._number[live.key] = number
        if self._limit is not None and self.live_bytes > self._limit:
            raise OverBudget(f"{self.live_bytes} bytes of {self._limit}")

    def _give_back(self, gone: "_Live") -> None:
        self._live.pop(gone.key, None)
        self._number.pop(gone.key, None)
        self._events.append(~gone.number)
        self.live_bytes -= self._sizes[gone.number]


class _Live(weakref.ref):  # type: ignore[type-arg]
    """Memory that is there, and under which number it is counted."""

    __slots__ = ("key", "number")
    key: int
    number: int


def _among(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among the arguments of an operation: themselves, or in a list."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _among(value)
    return found


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for _, leaf, _ in flatten(tree)[0] if isinstance(leaf, Tensor)]


def _is_dense(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return tensor is not None and tensor.layout == torch.strided


def _dense_parts(tensor: Tensor) -> Sequence[Tensor]:
    """The tensors whose memory a tensor is made of: itself, or the parts of a sparse one."""
    if tensor.layout == torch.strided:
        return (tensor,)
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    return []
