"""How much memory does a micro-batch take? From the comings and goings of tensors at a few sizes to any size.

A window is a sequence of moments at which memory is taken or given back. Run with twice the rows, it is the same
sequence with other sizes; each size is a line in the rows, and, where rows have a length, a polynomial of second degree
in the length (attention that is not fused). So a few small runs say what every moment takes at any size, and the most
that is live at once is the largest of them. Which moment that is may change with the size, so that the peak itself is
no line: it is the upper envelope of many.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

from wholebatch.core.trace import KINDS, Kind, Size, Trace

PADDED = 4
"""Between two numbers of rows that were measured, kernels are taken to pad rows to a multiple of this. Unit: rows."""


@dataclass(frozen=True)
class Passes:
    """What the forward and backward passes of a window take, at any size.

    Attributes:
        rows: The two numbers of rows that were looked at.
        lengths: The lengths that were looked at: one, or up to three.
        traces: By size; every pair of the above.
        exact: Whether all traces were alike, so that each moment is known by itself.
    """

    rows: tuple[int, int]
    lengths: tuple[int, ...]
    traces: Mapping[Size, Trace]
    exact: bool = True
    _cache: dict[tuple[float, int, bool], tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, traces: Mapping[Size, Trace]) -> "Passes":
        """Return what a few runs say about all sizes.

        Args:
            traces: By size: two numbers of rows (or only one), each with the same lengths.

        Example:
            >>> def run(rows):
            ...     return Trace((100, 10 * rows, -10 * rows), ("gradients", "activations", "activations"), 3)
            >>> Passes.of({(2, 0): run(2), (4, 0): run(4)}).peak(100)
            1100
        """
        rows = sorted({each for each, _ in traces})
        lengths = tuple(sorted({each for _, each in traces}))
        first = next(iter(traces.values()))
        exact = all(first.like(trace) for trace in traces.values() if trace is not first)
        held = traces if exact else {size: trace.collapsed() for size, trace in traces.items()}
        return cls((rows[0], rows[-1]), lengths, dict(held), exact)

    def peak(self, rows: float, length: int = 0, *, alone: bool = False) -> int:
        """Return the most that is live at once above what is there before the window.

        Args:
            rows: Of a micro-batch; parts of one count as well.
            length: Of each of these rows, padded; 0 where rows have no length.
            alone: Whether it is the only micro-batch of its window, so that no earlier one has left a gradient.
        """
        return self._highest(rows, length, alone)[1]

    def held(self, rows: float, length: int = 0, *, alone: bool = False) -> dict[Kind, int]:
        """Return what is live at the highest moment, by kind; the values add up to `peak`."""
        at, peak = self._highest(rows, length, alone)
        sums: dict[Kind, float] = {}
        for weight, trace in self._weighted(rows, length):
            for change, kind in zip(trace.changes[:at], trace.kinds, strict=False):
                sums[kind] = sums.get(kind, 0.0) + weight * change
        held = {kind: max(0, round(size)) for kind, size in sums.items()}
        if held:
            most = max(held, key=held.__getitem__)
            held[most] += peak - sum(held.values())  # what rounding leaves
        return held

    def _highest(self, rows: float, length: int, alone: bool) -> tuple[int, int]:
        """The moment at which most is live, as a number of changes, and how much that is."""
        key = rows, length, alone
        if key not in self._cache:
            live = [0.0] * len(self._moments)
            for weight, trace in self._weighted(rows, length):
                live = [one + weight * other for one, other in zip(live, self._live[id(trace)], strict=True)]
            if alone:
                live = live[: self._moments.index(next(iter(self.traces.values())).second) + 1]
            most = max(live)
            self._cache[key] = self._moments[live.index(most)], max(0, round(most))
        return self._cache[key]

    def _weighted(self, rows: float, length: int) -> list[tuple[float, Trace]]:
        """What each trace counts at a size: its sizes are a line in the rows, and a polynomial in the length."""
        low, high = self.rows
        share = (rows - low) / (high - low) if high > low else 0.0
        places = lagrange(self.lengths, length if len(self.lengths) > 1 else self.lengths[0])
        pairs = [
            (weight, self.traces[size, at])
            for at, place in zip(self.lengths, places, strict=True)
            for size, weight in ((low, place * (1 - share)), (high, place * share))
        ]
        return [(weight, trace) for weight, trace in pairs if weight]

    @cached_property
    def _moments(self) -> list[int]:
        """The moments that can be the highest at any size, as numbers of changes: a give-back follows a taking."""
        one = next(iter(self.traces.values()))
        if not self.exact:
            return list(range(len(one.changes) + 1))
        tops = [place for place, pair in enumerate(pairwise(one.changes), 1) if pair[0] > 0 >= pair[1]]
        return sorted({*tops, 0, one.second, len(one.changes)})

    @cached_property
    def _live(self) -> dict[int, list[int]]:
        """What is live at these moments, by trace."""
        found = {}
        for trace in self.traces.values():
            live = list(accumulate(trace.changes, initial=0))
            found[id(trace)] = [live[moment] for moment in self._moments]
        return found


def lagrange(places: Sequence[int], at: float) -> list[float]:
    """Return the weights with which values at some places give the value of their polynomial at another.

    Example:
        >>> lagrange([1, 2, 4], 2), lagrange([0, 10], 5)
        ([0.0, 1.0, 0.0], [0.5, 0.5])
    """
    weights = []
    for place in places:
        weight = 1.0
        for other in places:
            if other != place:
                weight *= (at - other) / (place - other)
        weights.append(weight + 0.0)
    return weights


@dataclass(frozen=True, slots=True)
class Need:
    """What training takes, at any size of the micro-batch.

    Attributes:
        resident: What is there all the time, by name: weights, buffers, optimizer state. Unit: bytes.
        passes: What forward and backward passes take above that.
        step_bytes: What the end of a window takes above `resident` at most: gradients, and what the optimizer needs
            for a moment. Unit: bytes.
        measured: The same passes as `passes`, small and real, with everything that kernels take for themselves;
            None: not measured.
        at: The length of the rows that `measured` ran on.
        smaller: The same with fewer rows than `measured`, from more rows to fewer: what kernels take has steps there.
    """

    resident: Mapping[str, int]
    passes: Passes
    step_bytes: int = 0
    measured: Passes | None = None
    at: int = 0
    smaller: tuple[Passes, ...] = ()

    @property
    def resident_bytes(self) -> int:
        """What is there all the time. Unit: bytes."""
        return sum(self.resident.values())

    @property
    def floor_bytes(self) -> int:
        """What no cut can save: `resident`, gradients and the step. Unit: bytes."""
        return self.resident_bytes + self.step_bytes

    def peak(self, rows: float, length: int = 0, *, alone: bool = False) -> int:
        """Return the most that training takes at once, as for `Passes.peak`. Unit: bytes."""
        held = self.passes.peak(rows, length, alone=alone) + self.scratch(rows, length, alone=alone)
        return self.resident_bytes + max(held, self.step_bytes)

    def scratch(self, rows: float, length: int = 0, *, alone: bool = False) -> int:
        """Return what the measured runs took more than what the tensors of the model explain. Unit: bytes."""
        if self.measured is None:
            return 0
        alike = max(1, round(rows * length / self.at)) if length and self.at else rows
        measured = self.measured
        if self.smaller and alike < measured.rows[0]:
            if all(alike != each.rows[0] for each in self.smaller):
                alike = min(measured.rows[0], -(-alike // PADDED) * PADDED)
            alike = max(alike, self.smaller[-1].rows[0])
            measured = next(each for each in self.smaller if alike >= each.rows[0])
        return measured.peak(alike, alone=alone) - self.passes.peak(alike, self.at, alone=alone)

    def by_kind(self, rows: int, length: int = 0, *, alone: bool = False) -> dict[str, int]:
        """Return what is live at the highest moment, by kind; the values add up to `peak`. Unit: bytes."""
        held = self.passes.held(rows, length, alone=alone)
        scratch = self.scratch(rows, length, alone=alone)
        kinds: dict[str, int] = dict(self.resident)
        if sum(held.values()) + scratch >= self.step_bytes:
            kinds |= {kind: held.get(kind, 0) for kind in KINDS}
            kinds["temporary"] += kinds.pop("arriving")
            kinds["scratch"] += max(0, scratch)
            for kind in ("temporary", "activations"):  # kernels may also take less than their operations say
                saved = min(kinds[kind], -min(0, scratch))
                kinds[kind] -= saved
                scratch += saved
        else:
            gradients = min(self.step_bytes, self.gradient_bytes)
            kinds |= {"gradients": gradients, "temporary": self.step_bytes - gradients}
        return {kind: size for kind, size in kinds.items() if size}

    @property
    def gradient_bytes(self) -> int:
        """What gradients take when all have arrived. Unit: bytes."""
        trace = next(iter(self.passes.traces.values()))
        kept = zip(trace.changes[: trace.second], trace.kinds, strict=False)
        changes = (change for change, kind in kept if kind in ("gradients", "running sum"))
        return max(accumulate(changes), default=0)

    def per_row(self, length: int = 0) -> float:
        """Return the activations that one row more keeps until its backward pass. Unit: bytes."""
        high = 4 * self.passes.rows[1]
        more, less = self.passes.held(high, length), self.passes.held(high - 1, length)
        return float(more.get("activations", 0) - less.get("activations", 0))
