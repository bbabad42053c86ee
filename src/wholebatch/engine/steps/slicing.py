"""How does a step that has begun come to its end where memory is gone? In slices, out of a reserve.

The reserve is taken before the first weight moves, so a step that cannot have it leaves no trace. A slice of a
parameter is so small that what its step takes for a moment, and the copy from which it is undone, fit into the reserve.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from wholebatch.engine.steps.undo import ALIGNED, fills_its_memory

NUMBERS, FEWER = 1 << 12, 1 << 9
"""Numbers of a parameter in a slice, and once such slices found no memory. Both are multiples of what vector units take
at once, so that the bits are the same."""

COPIES = 6 * 8 * NUMBERS
"""Room for the copy of a slice: weights, gradient and four tensors of state in 64 bits. Unit: bytes."""

RESERVE = COPIES + 8 * 8 * NUMBERS
"""What is held while a step runs: that room, and what the step on a slice takes for a moment. Unit: bytes."""

_BLOCK = 1 << 15
"""The second part is held in blocks, small enough for an allocator to keep them for this process. Unit: bytes."""

NUMBER_BY_NUMBER = frozenset(
    getattr(optim, name)
    for name in ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
)
"""PyTorch's optimizers that move each number of a parameter on its own."""


class Reserve:
    """Memory that is held while a step runs, so that it can be ended.

    Args:
        device: Where memory may run out.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: list[Tensor] = []
        self.copies: Tensor | None = None

    def take(self) -> None:
        """Hold it.

        Raises:
            Exception: There is not even so much memory.
        """
        if self.copies is None:
            self.copies = torch.empty(COPIES, dtype=torch.uint8, device=self._device)
        while len(self._blocks) * _BLOCK < RESERVE - COPIES:
            self._blocks.append(torch.empty(_BLOCK, dtype=torch.uint8, device=self._device))

    def open(self) -> None:
        """Let the step have it. The room for copies stays."""
        self._blocks.clear()

    def give_back(self) -> None:
        """Hold nothing any more."""
        self._blocks.clear()
        self.copies = None


def can_be_sliced(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Return whether a step on a parameter is that on its slices.

    Its gradient and the optimizer's state lie in memory as the parameter does, and the state is complete.

    Args:
        optimizer: Which has stepped before.
        parameter: With a gradient.
    """
    grad = parameter.grad
    if type(optimizer) not in NUMBER_BY_NUMBER or grad is None or not fills_its_memory(parameter):
        return False
    strides = parameter.stride()
    if grad.layout != torch.strided or grad.stride() != strides:
        return False
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.numel() != 1 and value.stride() != strides:
            return False
        if isinstance(value, Tensor) and value.numel() != 1 and value.shape != parameter.shape:
            return False
    return True


class Slices:
    """The step of one parameter, a slice at a time; after a failure it goes on where it was.

    Args:
        optimizer: Whose step.
        parameter: One that `can_be_sliced`.
        reserve: Holds the room for copies.
    """

    def __init__(self, optimizer: Optimizer, parameter: nn.Parameter, reserve: Reserve) -> None:
        self._optimizer = optimizer
        self._parameter = parameter
        self._reserve = reserve
        self._state: dict[str, Any] = optimizer.state.get(parameter, {})
        self._after: dict[str, Any] = {}
        self._start = 0

    def step(self, numbers: int) -> None:
        """Step what is left.

        Args:
            numbers: How many at a time.

        Raises:
            Exception: What a step raised. The slice under way is as it was.
        """
        count, each = self._parameter.numel(), min(numbers, self._room())
        while self._start < count:
            end = min(self._start + each, count)
            self._step_slice(self._start, end)
            self._start = end
        for name, value in self._after.items():
            held = self._state.get(name)
            if isinstance(held, Tensor):
                held.copy_(value)
            else:
                self._state[name] = value

    def _step_slice(self, start: int, end: int) -> None:
        optimizer, whole = self._optimizer, self._parameter
        assert whole.grad is not None
        part = nn.Parameter(_flat(whole, start, end))
        part.grad = _flat(whole.grad, start, end)
        parts = {name: _flat(value, start, end) for name, value in self._state.items() if not _stands_once(value)}
        once = {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in self._state.items()
            if _stands_once(value)
        }
        state = {**once, **parts}
        changed = [part.detach(), part.grad, *parts.values()]
        copies = self._copied(changed)
        try:
            with _alone(optimizer, whole, part, state):
                optimizer.step()
            for name, value in self._state.items():
                if not _stands_once(value) and state[name] is not parts[name]:
                    parts[name].copy_(state[name])
        except BaseException:
            for tensor, copy in zip(changed, copies, strict=True):
                tensor.copy_(copy)
            raise
        self._after = {name: state[name] for name, value in self._state.items() if _stands_once(value)}

    def _room(self) -> int:
        """How many numbers have room for their copies."""
        moved = [self._parameter, self._parameter.grad, *self._state.values()]
        each = sum(value.element_size() for value in moved if isinstance(value, Tensor))
        return max(1, (COPIES // each - ALIGNED) // ALIGNED * ALIGNED)

    def _copied(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of tensors, in the room that is held for them."""
        room = self._reserve.copies
        assert room is not None
        copies, end = [], 0
        for tensor in tensors:
            copies.append(room[end : end + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor))
            end += -(-tensor.nbytes // ALIGNED) * ALIGNED
        return copies


@contextmanager
def _alone(optimizer: Optimizer, whole: nn.Parameter, part: nn.Parameter, state: dict[str, Any]) -> Iterator[None]:
    """Let an optimizer see a part of one parameter, with its options, and nothing else."""
    groups = optimizer.param_groups
    group = next(each for each in groups if any(one is whole for one in each["params"]))
    held = group["params"]
    try:
        group["params"] = [part]
        optimizer.param_groups = [group]
        optimizer.state[part] = state
        yield
    finally:
        optimizer.param_groups = groups
        group["params"] = held
        optimizer.state.pop(part, None)


def _stands_once(value: Any) -> bool:
    """Whether an entry of the state is for the parameter as a whole, such as a number of steps."""
    return not isinstance(value, Tensor) or value.numel() == 1


def _flat(tensor: Tensor, start: int, end: int) -> Tensor:
    """Some of a tensor's numbers, in the order in which they lie in memory."""
    if tensor.numel() == 1:
        return tensor.detach()
    return tensor.detach().as_strided((end - start,), (1,), tensor.storage_offset() + start)
