"""How far does a meeting reach? Over the micro-batches of this process, or over those of all ranks.

Ranks say before each step where they are: that they open, meet, send gradients, end, close, or have failed. So ranks
with different numbers of micro-batches go together, one that has none follows, and nobody waits for one that failed.
Where graphs are joined each meeting hangs on the one before it, so that in the backward pass all ranks come by them in
the same order, whatever their own graphs look like.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from wholebatch.core.errors import MeetingError
from wholebatch.core.split import Indices
from wholebatch.core.weights import Count
from wholebatch.engine.device import modules
from wholebatch.engine.meetings.company import Again, Call, Order
from wholebatch.engine.ranks.wire import Wire


@dataclass(frozen=True, slots=True)
class Brought:
    """What all micro-batches bring to a meeting, those of other ranks among them.

    Attributes:
        values: In the order of ranks and micro-batches.
        beside: What each brings besides.
    """

    values: Sequence[Any]
    beside: Sequence[Any]


class Reach(Protocol):
    """The micro-batches that meet.

    Attributes:
        order: Where the rows of all of them stand in the logical batch.
        rows: Where those of this process stand; None: nobody knows, or there are no others.
    """

    order: Order
    rows: Sequence[Indices | None]

    @property
    def ranks(self) -> int:
        """How many processes have micro-batches that meet."""
        ...

    def open(self) -> None:
        """Begin."""
        ...

    def hear(self, calls: Sequence[Call], values: Sequence[Any], *, graph: bool) -> Brought:
        """Return what all micro-batches bring to a meeting.

        Args:
            calls: Of the micro-batches of this process.
            values: What they bring.
            graph: Whether the gradient of what other ranks get is to come back in the backward pass.
        """
        ...

    def add_up(self, gradient: Tensor | None, like: Tensor) -> Tensor | None:
        """Return the sum of what all micro-batches give for a meeting; None: nobody gives anything.

        Args:
            gradient: What those of this process give, or None.
            like: What the meeting came to.
        """
        ...

    def end(self) -> None:
        """Say that the forward passes of this process are done."""
        ...

    def say_again(self, why: str) -> None:
        """Tell the others that the graphs have to be joined after all."""
        ...

    def roots(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return where the backward pass has to begin besides, and the gradients that enter there."""
        ...

    def close(self) -> None:
        """Say that this process needs nothing more from the others."""
        ...


class Near:
    """Only the micro-batches of this process.

    Args:
        cut: Where their rows stand in the logical batch; None: nobody knows.
        micro_batches: How many there are.
    """

    ranks = 1

    def __init__(self, cut: Sequence[Indices] | None, micro_batches: int) -> None:
        self.order = Order(cut)
        self.rows: Sequence[Indices | None] = cut if cut is not None else [None] * micro_batches

    def hear(self, calls: Sequence[Call], values: Sequence[Any], *, graph: bool) -> Brought:  # noqa: ARG002
        return Brought(values, [call.beside for call in calls])

    def add_up(self, gradient: Tensor | None, like: Tensor) -> Tensor | None:  # noqa: ARG002
        return gradient

    def open(self) -> None:
        pass

    def end(self) -> None:
        pass

    def say_again(self, why: str) -> None:
        pass

    def roots(self) -> tuple[list[Tensor], list[Tensor]]:
        return [], []

    def close(self) -> None:
        pass


class RankFailedError(Exception):
    """Another rank has failed while micro-batches met. It leaves no accumulator: its group asks what happened."""


class Far:
    """The micro-batches of all ranks.

    Args:
        wire: Speaks to the others.
        cut: Where the rows of this process stand in its part of the logical batch; None: nobody knows.
        micro_batches: How many this process has.
        model: Its modules have the same order on all ranks.
        device: Where it is.
        reference: Returns what this rank divides its losses by; see `wholebatch.core.weights.common_factor`.
    """

    def __init__(
        self,
        wire: Wire,
        cut: Sequence[Indices] | None,
        micro_batches: int,
        model: nn.Module,
        device: torch.device,
        reference: Callable[[], Count],
    ) -> None:
        self._wire = wire
        self._model = model
        self._device = device
        self._reference = reference
        self._places = {id(module): place for place, module in enumerate(modules(model))}
        self._token: Tensor | None = None
        self._cut, self._micro_batches = cut, micro_batches
        self._idle: list[int] = []
        self.order = Order(None)
        self.rows: Sequence[Indices | None] = []
        self.is_over = False

    @property
    def ranks(self) -> int:
        return self._wire.ranks

    def open(self) -> None:
        """Say that this rank begins; without a micro-batch, take part in all that the others do."""
        cut, micro_batches, wire = self._cut, self._micro_batches, self._wire
        own = None if cut is None else [list(each) for each in cut]
        heard = self._say("opens", own) if micro_batches else self._follow("opens")
        cuts: list[Any] = [None if each is _IDLE else each for each in heard]
        starts = [0, *accumulate(sum(map(len, each or [])) for each in cuts)]
        self._idle = [rank for rank, each in enumerate(heard) if each is _IDLE]
        known = all(each is not None for rank, each in enumerate(cuts) if rank not in self._idle)
        all_rows = [
            [start + row for row in part] for start, each in zip(starts, cuts, strict=False) for part in each or []
        ]
        self.order = Order(all_rows if known else None)
        mine = starts[wire.rank]
        self.rows = (
            [[mine + row for row in part] for part in own] if own is not None and known else [None] * micro_batches
        )
        if not micro_batches and len(self._idle) < wire.ranks:
            self._follow_to_the_end()

    def hear(self, calls: Sequence[Call], values: Sequence[Any], *, graph: bool) -> Brought:
        """Return what all micro-batches bring to a meeting."""
        first = calls[0]
        graph = graph and any(isinstance(value, Tensor) and value.requires_grad for value in values)
        where = first.kind, os.path.basename(first.site.file), first.site.line, self._places.get(id(first.of))  # noqa: PTH119
        brings = [_description(value) for value in values]
        heard = self._say("meets", (where, str(first), brings, _to_host([call.beside for call in calls]), graph))
        said = [None if each is _IDLE else each for each in heard]
        self._require_same_place(said)
        brings_of = [[] if each is None else each[2] for each in said]
        flat = self._side_by_side(values, brings_of)
        own = range(start := sum(map(len, brings_of[: self._wire.rank])), start + len(values))
        everything = [
            self._unpacked(what, part)
            for brought, parts in zip(brings_of, flat, strict=True)
            for what, part in zip(brought, parts, strict=True)
        ]
        everything[own.start : own.stop] = values
        if any(each is not None and each[4] for each in said):
            everything = self._with_graph(everything, own)
        beside = [
            each if rank == self._wire.rank else _to_device(each, self._device)
            for rank, of_rank in enumerate(said)
            if of_rank is not None
            for each in ([call.beside for call in calls] if rank == self._wire.rank else of_rank[3])
        ]
        return Brought(everything, beside)

    def add_up(self, gradient: Tensor | None, like: Tensor) -> Tensor | None:
        """Return the sum of what all micro-batches give for a meeting; None: nobody gives anything."""
        wide = torch.promote_types(like.dtype, torch.float32)
        heard = self._say("gradients", (like.numel(), wide, gradient is not None))
        if not any(each is not _IDLE and each[2] for each in heard):
            return None
        total = torch.zeros_like(like, dtype=wide) if gradient is None else gradient.to(wide, copy=True)
        return self._added(total.contiguous())

    def end(self) -> None:
        """Say that the forward passes of this process are done."""
        self._say("ends", None)

    def roots(self) -> tuple[list[Tensor], list[Tensor]]:
        """The last meeting, from which the backward pass comes by all others, on every rank."""
        return ([self._token], [torch.zeros_like(self._token)]) if self._token is not None else ([], [])

    def close(self) -> None:
        """Say that this process needs nothing more from the others; the idle ones take its buffers."""
        self._say("closes", None)
        self._share_buffers()

    def say_failed(self) -> None:
        """Tell the others that this rank has failed, if they still listen."""
        if not self.is_over:
            self.is_over = True
            self._wire.gather(FAILED)

    def say_again(self, why: str) -> None:
        """Tell the others that the graphs have to be joined after all."""
        if not self.is_over:
            self.is_over = True
            self._judge([heard for heard in self._wire.gather(("again", why)) if heard == FAILED])

    def _say(self, kind: str, what: Any) -> list[Any]:
        """Say where this rank is, and return what the others say, who are there as well."""
        self.is_over = True  # unless all goes well
        heard = self._wire.gather((kind, what))
        self._judge(heard)
        self.is_over = kind == "closes"
        return [_IDLE if said == "idle" else what for said, what in heard]

    def _judge(self, heard: Sequence[tuple[str, Any]]) -> None:
        kinds = {kind for kind, _ in heard} - {"idle"}
        if "failed" in kinds:
            raise RankFailedError
        if "again" in kinds:
            raise Again(next(what for kind, what in heard if kind == "again"), joined=True)
        if len(kinds) > 1:
            raise _not_together([what[1] if kind == "meets" else kind for kind, what in heard])

    def _require_same_place(self, said: Sequence[Any]) -> None:
        if len({each[0] for each in said if each is not None}) > 1:
            self.is_over = True
            raise _not_together(["idle" if each is None else each[1] for each in said])

    def _follow(self, expected: str) -> list[Any]:
        """Listen once, with nothing to say."""
        self.is_over = True
        heard = self._wire.gather(("idle", None))
        self._judge(heard)
        self.is_over = False
        kinds = {kind for kind, _ in heard} - {"idle"}
        assert not kinds or expected in ("any", *kinds)
        self._heard = next(iter(kinds), "closes")
        return [_IDLE if said == "idle" else what for said, what in heard]

    def _follow_to_the_end(self) -> None:
        """Take part in all that the others do, with nothing to bring."""
        while True:
            said = self._follow("any")
            if self._heard == "closes":
                self.is_over = True
                self._share_buffers()
                return
            if self._heard == "meets":
                self._require_same_place([None if each is _IDLE else each for each in said])
                self._side_by_side([], [[] if each is _IDLE else each[2] for each in said])
            elif self._heard == "gradients":
                numel, wide, _ = next(each for each in said if each is not _IDLE)
                if any(each is not _IDLE and each[2] for each in said):
                    self._added(torch.zeros(numel, dtype=wide, device=self._device))

    def _share_buffers(self) -> None:
        """Let ranks without a micro-batch have the buffers of the first that had some."""
        if not self._idle or len(self._idle) == self._wire.ranks:
            return
        source = next(rank for rank in range(self._wire.ranks) if rank not in self._idle)
        for buffer in self._model.buffers():
            taken = buffer.detach().clone()
            self._wire.take_from(source, taken)
            if self._wire.rank in self._idle:
                with torch.no_grad():
                    buffer.copy_(taken)

    def _side_by_side(self, values: Sequence[Any], brings: Sequence[Sequence[Any]]) -> list[list[Tensor | None]]:
        """Return the bytes of each tensor that is brought, by rank and micro-batch."""
        sizes = [[_bytes(what) for what in brought] for brought in brings]
        longest = max(sum(size or 0 for size in each) for each in sizes)
        if longest == 0:
            return [[None if size is None else torch.empty(0, dtype=torch.uint8) for size in each] for each in sizes]
        own = torch.zeros(longest, dtype=torch.uint8, device=self._device)
        start = 0
        for value in values:
            if isinstance(value, Tensor):
                flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
                own[start : start + len(flat)] = flat
                start += len(flat)
        found: list[list[Tensor | None]] = []
        for each, buffer in zip(sizes, self._wire.side_by_side(own), strict=True):
            starts = accumulate((size or 0 for size in each), initial=0)
            parts = zip(starts, each, strict=False)
            found.append([None if size is None else buffer[at : at + size].clone() for at, size in parts])
        return found

    def _unpacked(self, what: Any, flat: Tensor | None) -> Any:
        if flat is None:
            return what
        shape, dtype = what
        return flat.to(self._device).view(dtype).reshape(shape)

    def _with_graph(self, everything: list[Any], own: range) -> list[Any]:
        """Return what is brought by all, so that the gradients that enter there come back to where it was brought."""
        places = [place for place, each in enumerate(everything) if isinstance(each, Tensor)]
        token = torch.zeros((), device=self._device, requires_grad=True) if self._token is None else self._token
        mine = [place in own for place in places]
        with torch.enable_grad():
            self._token, *found = _Shared.apply(self, mine, token, *(everything[place] for place in places))  # type: ignore[no-untyped-call]
        for place, each in zip(places, found, strict=True):
            everything[place] = each
        return everything

    def _added(self, total: Tensor) -> Tensor:
        """Add up gradients over ranks, in place, each in the measure of its rank before and of this one after."""
        reference = self._reference()
        total *= reference
        real = torch.view_as_real(total) if total.is_complex() else total
        self._wire.wait(self._wire.add_up(real))
        total /= reference
        return total


class _Shared(torch.autograd.Function):
    """What all ranks bring, as each of them reads it. In the backward pass what they give comes together."""

    @staticmethod
    def forward(ctx: Any, far: Far, mine: Sequence[bool], token: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.far, ctx.mine = far, mine
        ctx.dtypes = [value.dtype for value in values]
        found = [value.detach() for value in values]
        ctx.mark_non_differentiable(*(each for each in found if not _has_gradient(each)))
        return token.detach(), *found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_token: Tensor, *d_values: Tensor) -> tuple[Any, ...]:
        flowing = [
            d for d, dtype in zip(d_values, ctx.dtypes, strict=True) if dtype.is_floating_point or dtype.is_complex
        ]
        wide = torch.float32
        for each in flowing:
            wide = torch.promote_types(wide, each.dtype)
        flat = torch.cat([each.to(wide).reshape(-1) for each in flowing])
        total = ctx.far.add_up(flat, flat)
        parts = iter(total.split([each.numel() for each in flowing]))
        found: list[Tensor | None] = []
        for each, dtype, mine in zip(d_values, ctx.dtypes, ctx.mine, strict=True):
            if not (dtype.is_floating_point or dtype.is_complex):
                found.append(None)
                continue
            part = next(parts)
            found.append(part.reshape(each.shape).to(dtype) if mine else None)
        return None, None, d_token, *found


FAILED = ("failed", None)
"""Said by a rank that has failed, in place of where it is."""

_IDLE = object()
"""Said by a rank that has no micro-batch in a window."""


def _description(value: Any) -> Any:
    """What others have to know of a value before they get it: all of a number, shape and dtype of a tensor."""
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def _bytes(what: Any) -> int | None:
    if not isinstance(what, tuple):
        return None
    shape, dtype = what
    return int(torch.Size(shape).numel() * dtype.itemsize)


def _has_gradient(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _to_host(tree: Any) -> Any:
    if isinstance(tree, list | tuple):
        return type(tree)(_to_host(each) for each in tree)
    return tree.detach().cpu() if isinstance(tree, Tensor) else tree


def _to_device(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, list | tuple):
        return type(tree)(_to_device(each, device) for each in tree)
    return tree.to(device) if isinstance(tree, Tensor) else tree


def _not_together(where: Sequence[str]) -> MeetingError:
    said = {"ends": "ends", "opens": "begins", "gradients": "is done", "closes": "is done", "idle": "has no rows"}
    shown = [f"rank {rank} {said.get(each, f'meets at {each}')}" for rank, each in enumerate(where)]
    return MeetingError(
        f"The ranks do not meet at the same places: {', '.join(shown[:4])}.",
        hint="let every micro-batch on every rank make the same meetings in the same order.",
    )
