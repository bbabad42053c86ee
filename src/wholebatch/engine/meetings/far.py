"""How do the micro-batches of all ranks meet?

Ranks say before each step where they are: that they open, meet, send gradients, end, close, or have failed. So ranks
with different numbers of micro-batches go together, one that has none follows, and nobody waits for one that failed.
"""

import os
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wholebatch.core.errors import MeetingError
from wholebatch.core.split import Indices
from wholebatch.core.weights import Count
from wholebatch.engine.device import modules, move
from wholebatch.engine.meetings.company import Again, Call, Order
from wholebatch.engine.meetings.parcels import exchange, in_words, label_of
from wholebatch.engine.meetings.reach import Brought
from wholebatch.engine.meetings.sharing import shared
from wholebatch.engine.ranks.wire import Wire

FAILED = ("failed", None)
"""Said by a rank that has failed, in place of where it is."""


class RankFailedError(Exception):
    """Another rank has failed while micro-batches met. It leaves no accumulator: its group asks what happened."""


class Far:
    """The micro-batches of all ranks, as `Reach` has it.

    Args:
        wire: Speaks to the others.
        cut: Where the rows of this process stand in its part of the logical batch; None: nobody knows.
        micro_batches: How many this process has.
        model: Its modules have the same order on all ranks.
        device: Where it is.
        reference: Returns what this rank divides its losses by; see `wholebatch.core.weights.common_factor`.

    Attributes:
        order: Where the rows of all of them stand in the logical batch.
        rows: Where those of this process stand, as far as it is known.
        is_over: Whether nobody listens any more.
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
        own = None if self._cut is None else [list(each) for each in self._cut]
        _, heard = self._say("opens", _Opens(own)) if self._micro_batches else self._say("idle")
        self._idle = [rank for rank, each in enumerate(heard) if each is None]
        cuts: list[list[list[int]] | None] = [[] if each is None else each.rows for each in heard]
        starts = [0, *accumulate(sum(map(len, each or [])) for each in cuts)]
        placed = [
            [[start + row for row in part] for part in each or []] for start, each in zip(starts, cuts, strict=False)
        ]
        if all(each is not None for each in cuts):
            self.order = Order([part for each in placed for part in each])
            self.rows = placed[self._wire.rank]
        else:
            self.rows = [None] * self._micro_batches
        if not self._micro_batches and len(self._idle) < self._wire.ranks:
            self._follow()

    def hear(self, calls: Sequence[Call], values: Sequence[Any], *, graph: bool) -> Brought:
        """Return what all micro-batches bring to a meeting."""
        first, rank = calls[0], self._wire.rank
        where = first.kind, os.path.basename(first.site.file), first.site.line, self._places.get(id(first.of))  # noqa: PTH119
        beside = [call.beside for call in calls]
        graph = graph and any(isinstance(value, Tensor) and value.requires_grad for value in values)
        mine = _Meets(where, str(first), list(map(label_of, values)), in_words(beside), graph)
        _, said = self._say("meets", mine)
        everything = self._meet(said, values)
        start = sum(len(each.labels) for each in said[:rank] if each is not None)
        own = range(start, start + len(values))
        everything[own.start : own.stop] = values
        if any(each is not None and each.graph for each in said):
            token = torch.zeros((), device=self._device, requires_grad=True) if self._token is None else self._token
            self._token, everything = shared(self._give, token, everything, own)
        told = [[] if each is None else move(each.beside, self._device) for each in said]
        told[rank] = beside
        return Brought(everything, list(chain.from_iterable(told)))

    def add_up(self, gradient: Tensor | None, like: Tensor) -> Tensor | None:
        """Return the sum of what all micro-batches give for a meeting; None: nobody gives anything."""
        wide = torch.promote_types(like.dtype, torch.float32)
        _, heard = self._say("gradients", _Gives(like.numel(), wide, gradient is not None))
        if not any(each is not None and each.some for each in heard):
            return None
        total = torch.zeros_like(like, dtype=wide) if gradient is None else gradient.to(wide, copy=True)
        return self._added(total.contiguous())

    def end(self) -> None:
        """Say that the forward passes of this process are done."""
        self._say("ends")

    def roots(self) -> tuple[list[Tensor], list[Tensor]]:
        """The last meeting, from which the backward pass comes by all others, on every rank."""
        return ([self._token], [torch.zeros_like(self._token)]) if self._token is not None else ([], [])

    def close(self) -> None:
        """Say that this process needs nothing more from the others; the idle ones take its buffers."""
        self._say("closes")
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
            if FAILED in self._wire.gather(("again", why)):
                raise RankFailedError

    def _say(self, kind: str, what: Any = None) -> tuple[str, list[Any]]:
        """Say where this rank is, and return where those are that have micro-batches, and what each rank says of it."""
        self.is_over = True  # unless all goes well
        heard = self._wire.gather((kind, what))
        kinds = {kind for kind, _ in heard} - {"idle"}
        if "failed" in kinds:
            raise RankFailedError
        if "again" in kinds:
            raise Again(next(what for kind, what in heard if kind == "again"), joined=True)
        if len(kinds) > 1:
            raise _not_together([what.shown if kind == "meets" else kind for kind, what in heard])
        found = next(iter(kinds), "idle")
        self.is_over = found == "closes"
        return found, [what for _, what in heard]

    def _meet(self, said: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        """Return what all ranks bring to a meeting, if it is the same."""
        if len({each.where for each in said if each is not None}) > 1:
            self.is_over = True
            raise _not_together(["idle" if each is None else each.shown for each in said])
        return exchange(self._wire, values, [[] if each is None else each.labels for each in said], self._device)

    def _follow(self) -> None:
        """Take part in all that the others do, with nothing to bring."""
        while True:
            kind, said = self._say("idle")
            if kind == "closes":
                self._share_buffers()
                return
            if kind == "meets":
                self._meet(said, [])
            elif kind == "gradients" and any(each is not None and each.some for each in said):
                gives = next(each for each in said if each is not None)
                self._added(torch.zeros(gives.numel, dtype=gives.dtype, device=self._device))

    def _share_buffers(self) -> None:
        """Let ranks without a micro-batch have the buffers of the first that had some."""
        if not self._idle:
            return
        source = next(rank for rank in range(self._wire.ranks) if rank not in self._idle)
        for buffer in self._model.buffers():
            taken = buffer.detach().clone()
            self._wire.take_from(source, taken)
            if self._wire.rank in self._idle:
                with torch.no_grad():
                    buffer.copy_(taken)

    def _give(self, gradient: Tensor) -> Tensor:
        total = self.add_up(gradient, gradient)
        assert total is not None
        return total

    def _added(self, total: Tensor) -> Tensor:
        """Add up gradients over ranks, in place, each in the measure of its rank before and of this one after."""
        reference = self._reference()
        total *= reference
        real = torch.view_as_real(total) if total.is_complex() else total
        self._wire.wait(self._wire.add_up(real))
        total /= reference
        return total


class _Opens(NamedTuple):
    """Where the rows of a rank's micro-batches stand in its part of the logical batch; None: nobody knows."""

    rows: list[list[int]] | None


class _Meets(NamedTuple):
    """The meeting that a rank is at."""

    where: tuple[object, ...]
    shown: str
    labels: list[Any]
    beside: list[Any]
    graph: bool


class _Gives(NamedTuple):
    """What a rank gives for a meeting."""

    numel: int
    dtype: torch.dtype
    some: bool


def _not_together(where: Sequence[str]) -> MeetingError:
    said = {"ends": "ends", "opens": "begins", "gradients": "is done", "closes": "is done", "idle": "has no rows"}
    shown = [f"rank {rank} {said.get(each, f'meets at {each}')}" for rank, each in enumerate(where)]
    return MeetingError(
        f"The ranks do not meet at the same places: {', '.join(shown[:4])}.",
        hint="let every micro-batch on every rank make the same meetings in the same order.",
    )
