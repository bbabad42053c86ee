"""What fits? From what training needs and a budget to a plan with its reasons.

The order is that of least harm. A batch that fits is not cut. Computing in 16 bits changes numbers, so it is proposed
and never chosen. Activation checkpointing costs a part of the forward pass, so blocks are recomputed only where a
single row does not fit without, or where larger micro-batches win more than that; and as few of them as will do, those
first that free most bytes for a second. Keeping activations on the host is the last resort. Cutting costs nearly
nothing, so it comes last and goes as far as it must, or as it pays.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from wholebatch.core.budget import say_bytes, say_rate, say_rows
from wholebatch.core.need import Need
from wholebatch.core.plan import Alternative, Plan
from wholebatch.core.sizes import candidates, evened, fastest, largest_rows, largest_tokens, line
from wholebatch.core.split import Rows, Tokens
from wholebatch.core.ways import Ladder, Way

PAYS = 0.05
"""Blocks are recomputed for the sake of speed only if that is said to win more than this share."""

Clock: TypeAlias = Callable[[Sequence[int], Way], Mapping[int, float]]
"""Times passes of some numbers of rows for real, as a way has it. Unit: seconds."""


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
        shared: Whether these are the rows of one rank among several.
    """

    rows: int
    budget: int
    lengths: tuple[int, ...] | None = None
    length: Callable[[Any], int] | None = None
    precision: str = "fp32"
    folds: bool = False
    shared: bool = False

    @property
    def whole(self) -> str:
        """What the rows are, in words."""
        return (
            f"The whole share of a rank, {self.rows} rows,"
            if self.shared
            else f"The whole logical batch of {self.rows} rows"
        )

    @property
    def longest(self) -> int:
        """The longest row; 0 where rows have no length."""
        return max(self.lengths) if self.lengths else 0


@dataclass(slots=True)
class Planner:
    """Chooses, and says why.

    Args:
        task: What is to be planned.
        ways: How it could be trained: first as it is, then others that are compared, and may be chosen if they
            recompute.
        clock: Times passes of some sizes for real; None: nobody did.
        notes: Reasons from measuring.
        ladder: Ways that recompute one block, two, and so on.
        last: Makes the way that keeps activations on the host, where there is one.
    """

    task: Task
    ways: Sequence[Way]
    clock: Clock | None = None
    notes: Sequence[str] = ()
    ladder: Ladder = field(default_factory=lambda: Ladder(0, lambda _: None))
    last: Callable[[], Way | None] = lambda: None
    _reasons: list[str] = field(default_factory=list)

    def plan(self) -> Plan:
        """Return the plan."""
        plain = self.ways[0]
        way = plain if self._most(plain) else self._squeezed(plain)
        return self._refusal(plain) if way is None else self._choice(way, self._most(way))

    def _squeezed(self, plain: Way) -> Way | None:
        """The way of least harm in which a single row fits, where it does not as it is."""
        task, one = self.task, say_bytes(plain.need.peak(1, self.task.longest))
        way = self.ladder.fewest(lambda each: self._most(each) > 0)
        if way is not None:
            self._say(
                f"A single row does not fit as it is ({one} of {say_bytes(task.budget)}), and does if "
                f"{_recomputed(way.blocks)}: {say_bytes(way.need.peak(1, task.longest))}. "
                "plan.apply(model) lets them."
            )
            self._say(way.why)
            return way
        way = self.last()
        if way is None or self._most(way) == 0:
            return None
        self._say(
            f"A single row does not fit as it is ({one} of {say_bytes(task.budget)}), nor if blocks recompute their "
            "activations; it does if they wait in the host's memory, which costs a copy there and back: "
            f"{say_bytes(way.need.peak(1, task.longest))}. plan.apply(model) sees to it."
        )
        return way

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
        if not fits:
            self._say(self._would_fit(micro_batch))
        seconds: Mapping[int, float] = {}
        if fits and self.clock is not None and isinstance(micro_batch, Rows):
            seconds = self.clock(candidates(min(micro_batch.rows, task.rows))[-1:], way)
        return self._made(way, micro_batch, parts, peak, fits, seconds)

    def _would_fit(self, micro_batch: Rows | Tokens) -> str:
        """What of this micro-batch would fit, and with what it would as a whole."""
        task = self.task

        def takes(way: Way) -> int:
            if isinstance(micro_batch, Rows):
                return way.need.peak(micro_batch.rows, task.longest, alone=micro_batch.rows >= task.rows)
            return self._cut(micro_batch, way.need)[1]

        most = self._most(self.ways[0])
        said = [f"At most {say_rows(most)} would fit." if most else "Not even one row would fit."]
        way = self.ladder.fewest(lambda each: takes(each) <= task.budget, any_length=isinstance(micro_batch, Tokens))
        said += [f"It would, if {_recomputed(way.blocks)}."] if way is not None else []
        return " ".join(said)

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
                f"{task.whole} fits at once ({say_bytes(peak)} of "
                f"{say_bytes(task.budget)}), so nothing is cut: accumulation would only take time."
            )
            if self.clock is not None:
                seconds = self.clock(candidates(task.rows)[:1], way)
        else:
            self._say(
                f"{task.whole} would take "
                f"{say_bytes(need.peak(task.rows, task.longest, alone=True))} of {say_bytes(task.budget)}; "
                f"at most {say_rows(most)} at once{', of the longest' if task.longest else ''}."
            )
            rows = most = evened(task.rows, most)
            if self.clock is not None:
                seconds = self.clock(candidates(rows), way)
                rows = self._by_the_clock(rows, seconds)
                way, rows, seconds = self._paying(way, rows, seconds)
                need, most = way.need, max(most, rows)
            whole = rows >= task.rows
            micro_batch, parts = Rows(rows), math.ceil(task.rows / rows)
            peak = need.peak(rows, task.longest, alone=whole)
            if task.lengths and task.length is not None and not whole:
                most_tokens = largest_tokens(need, task.budget, task.lengths)
                tokens = most_tokens if rows == most else min(most_tokens, rows * task.longest)
                micro_batch = Tokens(tokens, task.length)
                parts, peak = self._cut(micro_batch, need)
                self._say(
                    f"Rows differ in length ({min(task.lengths)} to {task.longest} tokens), so they are sorted and cut "
                    f"by padded tokens: {tokens} at once, whether of few long rows or of many short ones; at most "
                    f"{most_tokens} fit."
                )
        return self._made(way, micro_batch, parts, peak, True, seconds)

    def _paying(self, way: Way, rows: int, seconds: Mapping[int, float]) -> tuple[Way, int, Mapping[int, float]]:
        """Recompute more blocks where the larger micro-batches that this makes room for win more than it costs."""
        task = self.task
        if not seconds or self.clock is None:
            return way, rows, seconds
        once, each = line(seconds) if len(seconds) > 1 else (next(iter(seconds.values())), 0.0)
        parts = math.ceil(task.rows / rows)
        now = self._seconds(seconds, Rows(rows))
        if once * (parts - 1) <= PAYS * now:  # one micro-batch instead of all of them would not win that much
            return way, rows, seconds
        best, chosen = now, None
        while parts > 1:
            parts = (parts + 1) // 2
            size = math.ceil(task.rows / parts)
            taken = once * parts + each * task.rows
            over = self.ways[0].need.peak(size, task.longest, alone=parts == 1) - task.budget
            if taken * self.ladder.slower(over / size) / way.slower >= (1 - PAYS) * now:
                continue  # nor would it with as few blocks as could be
            other = self.ladder.fewest(lambda each, size=size: self._most(each) >= size)  # type: ignore[misc]
            if other is None:
                break
            if taken * other.slower / way.slower < best:
                best, chosen = taken * other.slower / way.slower, (other, size)
        if chosen is None or best >= (1 - PAYS) * now:
            return way, rows, seconds
        other, size = chosen
        found = self.clock([rows, size], other)
        if size not in found or found[size] * task.rows / size >= (1 - PAYS) * now:
            return way, rows, seconds
        self._say(
            f"If {_recomputed(other.blocks)}, {say_rows(size)} fit at once, and it pays: "
            f"{say_rate(size / found[size])} rows a second instead of {say_rate(task.rows / now)}. "
            "plan.apply(model) lets them."
        )
        self._say(other.why)
        return other, size, found

    def _by_the_clock(self, rows: int, seconds: Mapping[int, float]) -> int:
        if len(seconds) < 2:
            return rows
        chosen = fastest(seconds)
        speeds = ", ".join(f"{say_rate(size / time)} with {size}" for size, time in sorted(seconds.items()) if time > 0)
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
            window = self._seconds(seconds, micro_batch)
        others = [
            self._alternative(each)
            for each in self.ways
            if each is not way and not (way.blocks and each.blocks == way.blocks)
        ]
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
            offload=way.offload,
            memory=by_kind,
            bytes_per_row=need.per_row(task.longest),
            seconds=window,
            timed=dict(seconds),
            alternatives=tuple(others),
            reasons=(*self._reasons, *self.notes, *way.notes),
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
        if reason:
            self._reasons.append(reason)


def _recomputed(names: Sequence[str]) -> str:
    return f"{_blocks(names)} {'recomputes its' if len(names) == 1 else 'recompute their'} activations"


def _blocks(names: Sequence[str]) -> str:
    if len(names) <= 3:
        return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{len(names)} blocks ({names[0]}, {names[1]}, ..., {names[-1]})"
