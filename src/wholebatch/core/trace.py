"""What came and went in a window? A sequence of moments at which memory is taken or given back."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["data", "activations", "gradients", "running sum", "temporary", "scratch", "arriving"]
"""What a piece of memory is there for, while a window runs. Gradients that will be added to those of an earlier
micro-batch are arriving; to a reader of plans they are temporary."""

Size: TypeAlias = tuple[int, int]
"""The rows of a micro-batch, and their length. Where rows have no length it is 0."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What came and went in a window of two micro-batches, and what the step took.

    Attributes:
        changes: Bytes that were taken (above 0) or given back (below 0), in order. Unit: bytes.
        kinds: What each was there for; as long as `changes`.
        second: Where the second micro-batch begins.
    """

    changes: tuple[int, ...]
    kinds: tuple[Kind, ...]
    second: int

    def like(self, other: "Trace") -> bool:
        """Whether another run was the same sequence of moments, with other sizes."""
        return (
            self.second == other.second
            and self.kinds == other.kinds
            and all((one > 0) == (two > 0) for one, two in zip(self.changes, other.changes, strict=True))
        )

    def doubled(self, rows: int = 1, weights: Container[int] = ()) -> "Trace":
        """Return what twice the rows would take at most: all but what is there once, twice.

        Args:
            rows: With which this was made. What grows with them is a multiple of their number.
            weights: Sizes of weights: what is as large, and no multiple of the rows, does not grow with them.
                Unit: bytes.
        """
        pairs = zip(self.changes, self.kinds, strict=True)
        grown = (each if _stays(each, kind, rows, weights) else 2 * each for each, kind in pairs)
        return Trace(tuple(grown), self.kinds, self.second)

    def doubtful(self, rows: int, weights: Container[int]) -> float:
        """Return which share of what `doubled` doubles is no multiple of the rows, or as large as a weight.

        The share is that of the moment at which most of it is live, which is the highest with many rows.

        Example:
            >>> trace = Trace((50, 14, -14, -50), ("activations", "temporary", "temporary", "activations"), 4)
            >>> trace.doubtful(5, ()), trace.doubtful(5, {14}), trace.doubled(5, {14}).changes
            (0.21875, 0.0, (100, 14, -14, -100))
        """
        pairs = zip(self.changes, self.kinds, strict=True)
        grows = [0 if _stays(each, kind, rows, weights) else each for each, kind in pairs]
        live = list(accumulate(grows, initial=0))
        there = grows[: live.index(max(live))]
        return sum(each for each in there if each % rows or abs(each) in weights) / max(1, sum(there))

    def grown(self, times: float, low: "Trace", high: "Trace") -> "Trace | None":
        """Return what more rows would take, where that follows from how it was with rows that are longer.

        What grew there with the rows is taken to grow here, and what stayed the same to stay. A size of which a part
        did each says nothing about its parts here.

        Args:
            times: By what factor there are more.
            low: As many rows as this trace has, longer ones.
            high: So many times more of them.

        Returns:
            None where it does not follow.

        Example:
            >>> kinds = ("gradients", "activations", "activations")
            >>> low, high = Trace((100, 20, -20), kinds, 3), Trace((100, 60, -60), kinds, 3)
            >>> Trace((100, 5, -5), kinds, 3).grown(3, low, high).changes
            (100, 15, -15)
        """
        if not (self.like(low) and self.like(high)):
            return None
        there = list(zip(low.changes, high.changes, strict=True))
        if any(two not in (one, times * one) for one, two in there):
            return None
        changes = (
            each if one == two else round(times * each) for each, (one, two) in zip(self.changes, there, strict=True)
        )
        return Trace(tuple(changes), self.kinds, self.second)

    def collapsed(self) -> "Trace":
        """Return a trace with one moment for each micro-batch: its own peak. Any two of these are alike.

        Example:
            >>> trace = Trace((5, 8, -8, 3, -3), ("gradients", "temporary", "temporary", "temporary", "temporary"), 3)
            >>> trace.collapsed().changes[:6]
            (0, 0, 5, 0, 8, 0)
        """
        changes: list[int] = []
        for end in (self.second, len(self.changes)):
            live = list(accumulate(self.changes[:end], initial=0))
            at = live.index(max(live))
            held = dict.fromkeys(KINDS, 0)
            for change, kind in zip(self.changes[:at], self.kinds, strict=False):
                held[kind] += change
            changes += held.values()
            changes += [-size for size in held.values()]
        return Trace(tuple(changes), KINDS * 4, 2 * len(KINDS))


_ONCE: tuple[Kind, ...] = ("gradients", "running sum", "arriving")


def _stays(change: int, kind: Kind, rows: int, weights: Container[int]) -> bool:
    return kind in _ONCE or (change % rows != 0 and abs(change) in weights)


KINDS: tuple[Kind, ...] = ("data", "activations", "gradients", "running sum", "temporary", "scratch", "arriving")


def few_looks(look: Callable[[Size], Trace], sizes: Sequence[Size]) -> dict[Size, Trace]:
    """Return the traces of some sizes, of which only those are looked at that do not follow from others.

    Args:
        look: Makes the trace of a size. The largest is asked for first, since it may be too much.
        sizes: One or two numbers of rows, each with the same lengths.
    """
    rows = sorted({each for each, _ in sizes})
    longest = max(length for _, length in sizes)
    traces: dict[Size, Trace] = {}
    for length in sorted({length for _, length in sizes}, reverse=True):
        for many in (rows[-1], rows[0]) if length == longest else rows:
            follows = None
            if many != rows[0] and length != longest:
                follows = traces[rows[0], length].grown(many / rows[0], traces[rows[0], longest], traces[many, longest])
            if (many, length) not in traces:
                traces[many, length] = follows or look((many, length))
    return traces
