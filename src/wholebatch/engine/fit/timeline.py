"""Which tensors are live when? Every storage that an operation makes, from its first tensor to its last."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wholebatch.core.need import Kind, Trace
from wholebatch.core.tree import flatten


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
        self._second: int | None = None
        self.live_bytes = 0
        self.peak_bytes = 0
        self.hidden: set[str] = set()

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
        kwargs = kwargs or {}
        for tensor in _among(args):
            self._ignore(tensor)
        for tensor in _among(tuple(kwargs.values())):
            self._ignore(tensor)
        result = func(*args, **kwargs)
        for tensor in _among((result,)):
            self._see(tensor)
        if _takes_more(func) or _narrow_product(func, args):
            self.hidden.add(func._schema.name)  # type: ignore[attr-defined]
        return result

    def _ignore(self, tensor: Tensor) -> None:
        for part in _dense_parts(tensor):
            storage = part.untyped_storage()
            key = id(storage)
            if key not in self._live:
                self._live[key] = weakref.ref(storage, partial(self._forget, key))

    def _forget(self, key: int, _: object) -> None:
        self._live.pop(key, None)

    def _see(self, tensor: Tensor) -> None:
        for part in _dense_parts(tensor):
            storage = part.untyped_storage()
            size = -(-storage.nbytes() // self._rounding) * self._rounding
            if id(storage) not in self._live and size and part.device.type == self._type:
                self._take(storage, size)

    def _take(self, storage: Any, size: int) -> None:
        key, number = id(storage), len(self._sizes)
        self._sizes.append(size)
        self._kinds.append("temporary")
        self._events.append(number)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

        def give_back(_: object) -> None:
            self._live.pop(key, None)
            self._number.pop(key, None)
            self._events.append(~number)
            self.live_bytes -= size

        self._live[key] = weakref.ref(storage, give_back)
        self._number[key] = number
        if self._limit is not None and self.live_bytes > self._limit:
            raise OverBudget(f"{self.live_bytes} bytes of {self._limit}")


_HIDDEN = {
    "convolution",
    "mkldnn",
    "cudnn",
    "miopen",
    "rnn",
    "lstm",
    "gru",
    "fft",
    "linalg",
    "bag",
    "sort",
    "argsort",
    "topk",
    "unique",
    "median",
    "quantile",
    "kthvalue",
    "cdist",
    "ctc",
}
"""Parts of the names of operations that are known to take memory within themselves."""


@cache
def _takes_more(func: Any) -> bool:
    """Whether an operation is known to take memory within itself."""
    space, _, name = func._schema.name.partition("::")
    return space not in ("aten", "prims", "profiler") or bool(_HIDDEN.intersection(name.split("_")))


_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear"}


def _narrow_product(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether it is a product in 16 bits, which a CPU computes from copies in another order."""
    return func._schema.name in _PRODUCTS and any(
        isinstance(each, Tensor) and each.element_size() == 2 and each.device.type == "cpu" for each in args
    )


def _among(values: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of an operation: themselves, or in a list."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _among(value)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for _, leaf, _ in flatten(tree)[0] if isinstance(leaf, Tensor)]


def _dense_parts(tensor: Tensor) -> list[Tensor]:
    """The tensors whose memory a tensor is made of: itself, or the parts of a sparse one."""
    if tensor.layout == torch.strided:
        return [tensor]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    return []
