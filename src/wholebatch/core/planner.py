"""What fits? From what training needs and a budget to a plan with its reasons.

The order is that of least harm. A batch that fits is not cut. Computing in 16 bits changes numbers, so it is proposed
and never chosen. Activation checkpointing costs a part of the forward pass, so it is taken only where a single row does
not fit without. Cutting costs nearly nothing, so it comes last and goes as far as it must, or as it pays.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wholebatch.core.budget import say_bytes, say_rows
from wholebatch.core.need import Need
from wholebatch.core.plan import Alternative, Plan
from wholebatch.core.split import Rows, Tokens

NEARLY = 0.02
"""The smallest micro-batch is taken whose speed is within this share of the best."""

KNOWN, GUESSED = 0.005, 0.04
"""The share of a budget that is left free: where every moment is known by itself, and where peaks are extrapolated."""

SLACK = 1 << 14
"""What is left free beside that where kernels take memory for themselves: the least that they take. Unit: bytes."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to train: what it needs, and what it is called.

    Attributes:
        name: Such as ``"as it is"``, ``"bf16"`` or ``"checkpointing"``.
        need: What it takes.
        blocks: Which blocks are recomputed.
        slower: By what a pass takes longer, about, as a factor.
    """

    name: str
    need: Need
    blocks: tuple[str, ...] = ()
    slower: float = 1.0


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be planned.

    Attributes:
        rows: Of a logical batch.
        budget: Unit: bytes.
        lengths: Tokens of each row of a logical batch; None where rows have no length.
        length: Says how long a row is; goes into `wb.Tokens`.
        precision: In which forward passes run.
        folds: Whether the optimizer takes gradients in as they arrive, as AdamA does.
    """

    rows: int
    budget: int
    lengths: tuple[int, ...] | None = None
    length: Callable[[Any], int] | None = None
    precision: str = "fp32"
    folds: bool = False

    @property
    def longest(self) -> int:
        """The longest row; 0 where rows have no length."""
        return max(self.lengths) if self.lengths else 0


def usable(need: Need, budget: int) -> int:
    """Return what of a budget may be planned for: the rest is for what cannot be known. Unit: bytes."""
    known = need.passes.exact and (need.measured is None or need.measured.exact)
    scratch = abs(need.scratch(*_top(need)))
    loose = not known or scratch > 0.02 * need.passes.peak(*_top(need))
    return math.floor(budget * (1 - (GUESSED if loose else KNOWN))) - (SLACK if scratch else 0)


def _top(need: Need) -> tuple[int, int]:
    return need.passes.rows[1], need.passes.lengths[-1]


def largest_rows(need: Need, budget: int, most: int, length: int = 0) -> int:
    """Return how many rows fit at once into what may be used of a budget; 0: not even one.

    Args:
        need: What training takes.
        budget: Unit: bytes.
        most: The most that are asked for.
        length: Of each row, padded.
    """
    room = usable(need, budget)

    def fits(rows: int) -> bool:
        return need.peak(rows, length, alone=rows >= most) <= room

    return most if fits(most) else _last(fits, most)


def largest_tokens(need: Need, task: Task) -> int:
    """Return the largest budget of padded tokens with which every micro-batch fits; 0: a row alone does not."""
    assert task.lengths
    room = usable(need, task.budget)
    ordered = sorted(max(1, length) for length in task.lengths)
    places = {ordered[round(share * (len(ordered) - 1) / 16)] for share in range(17)}
    longest = ordered[-1]
    if need.peak(1, longest) > room:
        return 0

    def fits(tokens: int) -> bool:
        return all(need.peak(min(len(ordered), max(1, tokens // length)), length) <= room for length in places)

    return longest - 1 + _last(lambda more: fits(longest - 1 + more), len(ordered) * longest)


def _last(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, where smaller ones do if it does; 0 if 1 does not."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def candidates(most: int) -> list[int]:
    """Return the numbers of rows that are worth a look at the clock: the most, a quarter and a sixteenth of it.

    Example:
        >>> candidates(64), candidates(3), candidates(1)
        ([4, 16, 64], [1, 3], [1])
    """
    return sorted({most, max(1, most // 4), max(1, most // 16)})


def fastest(seconds: Mapping[int, float]) -> int:
    """Return the smallest micro-batch that is within 2 % of the best, by its time for a row.

    Args:
        seconds: Time of a pass by its rows. Unit: seconds.

    Example:
        >>> fastest({4: 0.5, 16: 1.61, 64: 6.4})
        16
    """
    each = {rows: time / rows for rows, time in seconds.items()}
    best = min(each.values())
    return min(rows for rows, time in each.items() if time <= best * (1 + NEARLY))


def evened(rows: int, most: int) -> int:
    """Return the smallest micro-batch that cuts a batch into no more parts than the largest does.

    Example:
        >>> evened(100, 60), evened(512, 64)
        (50, 64)
    """
    return math.ceil(rows / math.ceil(rows / most))


def line(seconds: Mapping[int, float]) -> tuple[float, float]:
    """Return what a pass costs by itself and for each row, as a line through the smallest and the largest.

    Args:
        seconds: Time of a pass by its rows.

    Returns:
        Both at least 0. Unit: seconds.

    Example:
        >>> line({1: 1.5, 3: 2.5})
        (1.0, 0.5)
    """
    low, high = min(seconds), max(seconds)
    if low == high:
        return 0.0, seconds[low] / low
    each = max(0.0, (seconds[high] - seconds[low]) / (high - low))
    return max(0.0, seconds[high] - each * high), each


@dataclass(slots=True)
class Planner:
    """Chooses, and says why.

    Args:
        task: What is to be planned.
        ways: How it could be trained: first as it is, then others that are compared, and may be chosen if they
            recompute.
        clock: Times passes of some sizes for real; None: nobody did.
        notes: Reasons from measuring.
    """

    task: Task
    ways: Sequence[Way]
    clock: Callable[[Sequence[int]], Mapping[int, float]] | None = None
    notes: Sequence[str] = ()
    _reasons: list[str] = field(default_factory=list)

    def plan(self) -> Plan:
        """Return the plan."""
        task, plain = self.task, self.ways[0]
        way = plain
        if self._most(plain) == 0:
            way = next((each for each in self.ways if each.blocks and self._most(each) > 0), plain)
            if way is not plain:
                self._say(
                    f"A single row does not fit as it is ({say_bytes(plain.need.peak(1, task.longest))} of "
                    f"{say_bytes(task.budget)}), and does if {_blocks(way.blocks)} recompute their activations: "
                    f"{say_bytes(way.need.peak(1, task.longest))}. Call wb.checkpoint_blocks(model, "
                    "plan.checkpointing) before training."
                )
        most = self._most(way)
        if most == 0:
            return self._refusal(plain)
        return self._choice(way, most)

    def stated(self, micro_batch: Rows | Tokens) -> Plan:
        """Return the plan for a micro-batch that somebody has chosen."""
        task, way = self.task, self.ways[0]
        if isinstance(micro_batch, Rows):
            rows = min(micro_batch.rows, task.rows)
            parts, peak = math.ceil(task.rows / rows), way.need.peak(rows, task.longest, alone=rows == task.rows)
        else:
            parts, peak = self._cut(micro_batch, way.need)
        fits = peak <= task.budget
        self._say(
            f"The micro-batch of {micro_batch} was given: it takes {say_bytes(peak)}, "
            f"{'within' if fits else 'more than'} the {say_bytes(task.budget)} that there are."
        )
        seconds: Mapping[int, float] = {}
        if fits and self.clock is not None and isinstance(micro_batch, Rows):
            seconds = self.clock(candidates(min(micro_batch.rows, task.rows))[-1:])
        return self._made(way, micro_batch, parts, peak, fits, seconds)

    def _cut(self, tokens: Tokens, need: Need) -> tuple[int, int]:
        """How many micro-batches a token budget makes, and what the largest takes."""
        lengths = self.task.lengths or ()
        cut = tokens.cut(lengths)
        shapes = [(len(part), max(lengths[row] for row in part)) for part in cut]
        return len(cut), max(need.peak(rows, length, alone=len(cut) == 1) for rows, length in shapes)

    def _most(self, way: Way) -> int:
        return largest_rows(way.need, self.task.budget, self.task.rows, self.task.longest)

    def _choice(self, way: Way, most: int) -> Plan:
        task, need = self.task, way.need
        whole = most >= task.rows
        seconds: Mapping[int, float] = {}
        micro_batch: Rows | Tokens
        if whole:
            micro_batch, parts, peak = Rows(task.rows), 1, need.peak(task.rows, task.longest, alone=True)
            self._say(
                f"The whole logical batch of {task.rows} rows fits at once ({say_bytes(peak)} of "
                f"{say_bytes(task.budget)}), so nothing is cut: accumulation would only take time."
            )
            if self.clock is not None and not way.blocks:
                seconds = self.clock(candidates(task.rows)[:1])
        else:
            self._say(
                f"The whole logical batch of {task.rows} rows would take "
                f"{say_bytes(need.peak(task.rows, task.longest, alone=True))} of {say_bytes(task.budget)}; "
                f"at most {say_rows(most)} at once{', of the longest' if task.longest else ''}."
            )
            rows = most = evened(task.rows, most)
            if self.clock is not None and not way.blocks:
                seconds = self.clock(candidates(rows))
                rows = self._by_the_clock(rows, seconds)
            micro_batch, parts, peak = Rows(rows), math.ceil(task.rows / rows), need.peak(rows, task.longest)
            if task.lengths and task.length is not None:
                most_tokens = largest_tokens(need, task)
                tokens = most_tokens if rows == most else min(most_tokens, rows * task.longest)
                micro_batch = Tokens(tokens, task.length)
                parts, peak = self._cut(micro_batch, need)
                self._say(
                    f"Rows differ in length ({min(task.lengths)} to {task.longest} tokens), so they are sorted and cut "
                    f"by padded tokens: {tokens} at once, whether of few long rows or of many short ones; at most "
                    f"{most_tokens} fit."
                )
        return self._made(way, micro_batch, parts, peak, True, seconds)

    def _by_the_clock(self, rows: int, seconds: Mapping[int, float]) -> int:
        if len(seconds) < 2:
            return rows
        chosen = fastest(seconds)
        speeds = ", ".join(f"{size / time:,.4g} with {size}" for size, time in sorted(seconds.items()) if time > 0)
        if chosen < rows:
            self._say(f"A micro-batch of {say_rows(chosen)} is as fast as any that fits (rows a second: {speeds}).")
        else:
            self._say(f"The largest that fits is the fastest (rows a second: {speeds}).")
        return evened(self.task.rows, chosen)

    def _refusal(self, way: Way) -> Plan:
        task = self.task
        peak = way.need.peak(1, task.longest)
        floor = way.need.floor_bytes
        if floor > task.budget:
            self._say(
                f"Weights, gradients and optimizer take {say_bytes(floor)}, more than the {say_bytes(task.budget)} "
                "that there are: no cut can help, only a smaller model, fewer trained weights, or an optimizer with "
                "less state."
            )
        else:
            self._say(
                f"A single row takes {say_bytes(peak)}, more than may be used of {say_bytes(task.budget)}: "
                f"{say_bytes(floor)} for weights, gradients and optimizer, and the rest for its activations."
            )
        helping = [each.name for each in self.ways[1:] if self._most(each) > 0]
        if helping:
            self._say(f"It would fit with {' or '.join(helping)}.")
        return self._made(way, Rows(1), task.rows, peak, False, {})

    def _made(
        self,
        way: Way,
        micro_batch: Rows | Tokens,
        parts: int,
        peak: int,
        fits: bool,
        seconds: Mapping[int, float],
    ) -> Plan:
        task, need = self.task, way.need
        shape = (micro_batch.rows, task.longest) if isinstance(micro_batch, Rows) else self._shape(micro_batch, need)
        by_kind = need.by_kind(*shape, alone=parts == 1)
        window = None
        if seconds:
            window = self._seconds(seconds, micro_batch) * way.slower
        others = [self._alternative(each) for each in self.ways if each is not way]
        if need.passes.traces and not task.folds:
            others.append(self._folded(way))
        self._propose(others)
        return Plan(
            fits=fits,
            micro_batch=micro_batch,
            micro_batches=parts,
            peak_bytes=peak,
            budget_bytes=task.budget,
            logical_batch=task.rows,
            longest=task.longest,
            precision=task.precision,
            checkpointing=way.blocks,
            memory=by_kind,
            bytes_per_row=need.per_row(task.longest),
            seconds=window,
            timed=dict(seconds),
            alternatives=tuple(others),
            reasons=(*self._reasons, *self.notes),
            need=need,
        )

    def _seconds(self, seconds: Mapping[int, float], micro_batch: Rows | Tokens) -> float:
        """How long a window takes: what was timed, times how often, or by the padded tokens where lengths vary."""
        once, each = line(seconds)
        if isinstance(micro_batch, Rows):
            own = seconds.get(micro_batch.rows)
            if own is not None:
                return own * self.task.rows / micro_batch.rows
            return once * math.ceil(self.task.rows / micro_batch.rows) + each * self.task.rows
        lengths = self.task.lengths or ()
        cut = micro_batch.cut(lengths)
        padded = sum(len(part) * max(lengths[row] for row in part) for part in cut)
        return once * len(cut) + each * padded / max(1, self.task.longest)

    def _shape(self, tokens: Tokens, need: Need) -> tuple[int, int]:
        """The rows and the length of the micro-batch that takes most."""
        lengths = self.task.lengths or ()
        shapes = [(len(part), max(lengths[row] for row in part)) for part in tokens.cut(lengths)]
        return max(shapes, key=lambda shape: need.peak(*shape))

    def _alternative(self, way: Way) -> Alternative:
        most = self._most(way)
        at = min(max(1, most), self.task.rows)
        return Alternative(way.name, most, way.need.peak(at, self.task.longest, alone=at >= self.task.rows), way.slower)

    def _folded(self, way: Way) -> Alternative:
        """With an optimizer that folds gradients in as they come, none lives from one micro-batch to the next."""
        task, saved = self.task, way.need.gradient_bytes
        most = largest_rows(way.need, task.budget + saved, task.rows, task.longest)
        at = min(max(1, most), task.rows)
        return Alternative("AdamA", most, way.need.peak(at, task.longest) - saved, 1.0)

    def _propose(self, others: Sequence[Alternative]) -> None:
        plain = self._most(self.ways[0])
        for each in others:
            if each.name in ("bf16", "fp16") and each.largest_rows > plain and plain < self.task.rows:
                self._say(
                    f"precision={each.name!r} would hold {say_rows(each.largest_rows)} at once instead of {plain:,}; "
                    "it changes numbers, so it is proposed and not chosen."
                )

    def _say(self, reason: str) -> None:
        self._reasons.append(reason)


def _blocks(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} blocks ({names[0]} to {names[-1]})"
