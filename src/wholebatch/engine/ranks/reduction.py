"""How does a gradient travel between ranks? Once a window, in buckets whose order all ranks know beforehand.

A bucket is a stretch of memory for the gradients of some parameters. In the last backward pass of a window each
bucket is sent as soon as its parameters are done, so that the network works while the backward pass goes on. A rank
that has no gradient for a parameter, or no rows at all, sends zeros: every rank takes part in every reduction.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wholebatch.core.communication import BUCKET_BYTES
from wholebatch.core.errors import ConfigError
from wholebatch.core.weights import Count
from wholebatch.engine.gradients import norm_of
from wholebatch.engine.ranks.wire import Wire
from wholebatch.engine.sums import GradientSum

ReduceIn: TypeAlias = Literal["fp32", "bf16"]
"""The dtype in which gradients travel."""


def check_reduce_in(reduce_in: str | None) -> torch.dtype | None:
    """Return the dtype in which gradients travel; None: that of the sums, with 32 bits at least.

    Raises:
        ConfigError: Gradients cannot travel so.
    """
    if reduce_in is None:
        return None
    if reduce_in not in get_args(ReduceIn):
        raise ConfigError(
            f"reduce_in={reduce_in!r} is no way for gradients to travel between ranks.",
            hint='pass "fp32", "bf16" (half the bytes, 8 bits of each number), or leave it out.',
        )
    return torch.float32 if reduce_in == "fp32" else torch.bfloat16


class Reduction:
    """Adds up what all ranks have summed, once a window.

    Args:
        sums: What this rank sums.
        sparse: Parameters whose gradients the optimizer expects as sparse tensors.
        dtype: In which gradients travel; None: as the sums are, in 32 bits at least.
        wire: Speaks to the other ranks.
    """

    def __init__(
        self, sums: GradientSum, sparse: Sequence[nn.Parameter], dtype: torch.dtype | None, wire: Wire
    ) -> None:
        self.sums = sums
        self._sparse = set(sparse)
        self._wire = wire
        self._learning = [parameter.requires_grad for parameter in sums.parameters]
        self._buckets = _buckets(sums.parameters, dtype)
        self._bucket_of: dict[Tensor, _Bucket] = {
            parameter: bucket for bucket in self._buckets for parameter in bucket.parameters
        }
        self._hooks: list[RemovableHandle] = []
        self._sent = 0
        self._present: set[Tensor] = set()

    @property
    def device(self) -> torch.device:
        """Where messages are written."""
        return self.sums.parameters[0].device

    @property
    def nbytes(self) -> int:
        """What each rank sends a window. Unit: bytes."""
        return sum(bucket.numel * bucket.dtype.itemsize for bucket in self._buckets)

    def fits(self, sums: GradientSum) -> bool:
        """Whether this is the reduction of such sums, with the same parameters learning."""
        return sums is self.sums and self._learning == [parameter.requires_grad for parameter in sums.parameters]

    def start(self) -> None:
        """Begin a window: nothing is sent yet."""
        self.stop_listening()
        self._sent = 0
        self._present = set()
        for bucket in self._buckets:
            bucket.flat = bucket.work = None

    def listen(self, factor: Callable[[], Count]) -> None:
        """Send each bucket as soon as the next backward pass, which is the window's last, is done with it.

        Args:
            factor: What the gradients are multiplied by on their way.
        """
        for bucket in self._buckets:
            bucket.unfinished = len(bucket.parameters)

        def note(parameter: Tensor) -> None:
            bucket = self._bucket_of[parameter]
            bucket.unfinished -= 1
            if bucket.unfinished == 0 and bucket.flat is None:
                with torch.no_grad():
                    self._fill(bucket, factor())
                self._send()

        self._hooks = [cast(Any, each).register_post_accumulate_grad_hook(note) for each in self._bucket_of]

    def stop_listening(self) -> None:
        """Let further gradients be."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def finish(self, factor: Count) -> None:
        """Send what has not been sent. What is said next is on its way at once; `wait` says when all is there.

        Args:
            factor: What the gradients are multiplied by on their way.
        """
        self.stop_listening()
        with torch.no_grad():
            for bucket in self._buckets:
                if bucket.flat is None:
                    self._fill(bucket, factor)
        self._send()

    def wait(self) -> None:
        """Wait for all that was sent."""
        for bucket in self._buckets:
            self._wait(bucket)

    @property
    def begun(self) -> bool:
        """Whether a bucket has been filled."""
        return any(bucket.flat is not None for bucket in self._buckets)

    @property
    def late(self) -> bool:
        """Whether gradients arrived after their bucket had been sent, as a nested backward pass makes them."""
        return any(map(self.sums.holds, self._bucket_of))

    def repeat(self, factor: Count) -> None:
        """Send what arrived late, and add it to the total."""
        before, present = [bucket.flat for bucket in self._buckets], self._present
        self.start()
        self.finish(factor)
        self.wait()
        self._present |= present
        for bucket, flat in zip(self._buckets, before, strict=True):
            assert bucket.flat is not None
            assert flat is not None
            bucket.flat.add_(flat)

    def abandon(self) -> None:
        """Take part in what the others are still to send, with zeros, after this rank has failed."""
        self.stop_listening()
        sent, self._sent = self._sent, len(self._buckets)
        for bucket in self._buckets[:sent]:
            self._wait(bucket)
            bucket.flat = None
        for bucket in self._buckets[sent:]:
            bucket.flat = torch.zeros(bucket.numel, dtype=bucket.dtype, device=bucket.device)
            self._wire.wait(self._wire.add_up(bucket.flat))
            bucket.flat = None

    def norms(self) -> list[Tensor]:
        """Return the 2-norms of the total's parts, still on their devices. Each of shape ``[]``."""
        return [norm_of(bucket.flat) for bucket in self._buckets if bucket.flat is not None]

    def presence(self) -> list[bool]:
        """Return for each parameter, in the order of all ranks, whether this rank had a gradient for it."""
        return [parameter in self._present for parameter in self._bucket_of]

    def put(self, presence: Sequence[bool]) -> None:
        """Put the total where the sums were.

        Args:
            presence: For each parameter, whether any rank had a gradient for it.
        """
        present = iter(presence)
        for bucket in self._buckets:
            for parameter, view in bucket.views():
                if next(present):
                    self.sums.put(parameter, view.to_sparse(1) if parameter in self._sparse else view)
            bucket.flat = None

    def _fill(self, bucket: "_Bucket", factor: Count) -> None:
        narrow = bucket.dtype.itemsize < 4
        if isinstance(factor, Tensor):
            factor = factor.to(bucket.device)
        bucket.flat = torch.empty(bucket.numel, dtype=bucket.dtype, device=bucket.device)
        for parameter, view in bucket.views():
            gradient = self.sums.take_out(parameter)
            if gradient is None:
                view.zero_()
                continue
            self._present.add(parameter)
            if gradient.layout != torch.strided:
                gradient = gradient.to_dense()
            view.copy_(gradient * factor if narrow else gradient)
        if not narrow:
            bucket.flat.mul_(factor)

    def _wait(self, bucket: "_Bucket") -> None:
        if bucket.work is not None:
            self._wire.wait(bucket.work)
            bucket.work = None

    def _send(self) -> None:
        """Send the buckets that are filled, up to the first that is not: the order is that of all ranks."""
        for bucket in self._buckets[self._sent :]:
            if bucket.flat is None:
                break
            bucket.work = self._wire.add_up(bucket.flat)
            self._sent += 1


class _Bucket:
    """The gradients of some parameters, side by side."""

    __slots__ = ("device", "dtype", "flat", "numel", "parameters", "unfinished", "work")

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.parameters: list[nn.Parameter] = []
        self.numel = 0
        self.unfinished = 0
        self.flat: Tensor | None = None
        self.work: Any = None

    def views(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The place of each parameter, in its own strides where these leave no gaps."""
        flat, start = self.flat, 0
        assert flat is not None
        for parameter in self.parameters:
            numel = _numel(parameter)
            view = flat[start : start + numel]
            start += numel
            if parameter.is_complex():
                view = torch.view_as_complex(view.view(-1, 2))
            if parameter.is_contiguous() or not torch.ops.aten.is_non_overlapping_and_dense(parameter):
                yield parameter, view.view(parameter.shape)
            else:
                yield parameter, view.as_strided(parameter.shape, parameter.stride())


def _buckets(parameters: Sequence[nn.Parameter], dtype: torch.dtype | None) -> list[_Bucket]:
    """Buckets of parameters that learn, the last ones first, because their gradients are done first."""
    buckets: list[_Bucket] = []
    latest: dict[tuple[torch.device, torch.dtype], _Bucket] = {}
    for parameter in reversed(parameters):
        if not parameter.requires_grad:
            continue
        real = parameter.dtype.to_real()
        kind = parameter.device, dtype or (real if real.itemsize >= 4 else torch.float32)
        bucket = latest.get(kind)
        if bucket is None or (bucket.numel + _numel(parameter)) * bucket.dtype.itemsize > BUCKET_BYTES:
            bucket = latest[kind] = _Bucket(*kind)
            buckets.append(bucket)
        bucket.parameters.append(parameter)
        bucket.numel += _numel(parameter)
    return buckets


def _numel(parameter: nn.Parameter) -> int:
    """How many real numbers a gradient holds."""
    return 2 * parameter.numel() if parameter.is_complex() else parameter.numel()
