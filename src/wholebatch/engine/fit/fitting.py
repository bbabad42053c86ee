"""How many rows of this logical batch fit at once? Asked once for each kind of batch, answered from its own rows."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor

from wholebatch.core.batch import LogicalBatch
from wholebatch.core.budget import say_bytes, say_rows
from wholebatch.core.errors import OutOfMemoryError
from wholebatch.core.need import Need, Passes
from wholebatch.core.sizes import evened, largest_rows, least_budget, usable
from wholebatch.core.split import Indices
from wholebatch.core.trace import Size, Trace
from wholebatch.core.tree import flatten
from wholebatch.engine.fit.probe import Probe
from wholebatch.engine.fit.resident import held_bytes, weight_sizes
from wholebatch.engine.fit.room import available_bytes
from wholebatch.engine.fit.rowsize import largest_row, row_size
from wholebatch.engine.fit.sample import Sample
from wholebatch.engine.fit.timeline import OverBudget
from wholebatch.engine.fit.timing import fastest_of
from wholebatch.engine.meetings.exactnorm import exact_layers
from wholebatch.engine.narrow import SumIn
from wholebatch.engine.objective import Objective
from wholebatch.engine.precision import Precision
from wholebatch.engine.rehearsal import rehearsal
from wholebatch.engine.setup import Setup

Say: TypeAlias = Callable[[str, int], None]
"""Takes the reason of an automatic choice, and its level of logging."""

LOOK = 5
"""So many real rows of the first batch are looked at: a number that divides few sizes of weights."""

DOUBT = 0.05
"""Where more than this share of what they take may not grow with the rows, twice as many are looked at too."""

FAR, CLOSE = 0.1, 0.5
"""Kernels with memory of their own are measured where a plan takes more than the first share of the budget, and where
it takes more than the second, not far below the size that will be run."""

FEW = 16
"""Of fewer rows than that, those that will be run are measured themselves: kernels go other ways for one row than
for five."""


@dataclass
class Fitting:
    """Knows how many rows of a logical batch fit into a budget.

    Attributes:
        setup, objective, precision, sum_in: What is trained, and how.
        budget: Unit: bytes; None: what the device has free.
        need: What training takes, as it was found out last; None: it was not.
        collate, whole, dims: As for `wb.Accumulator`.
    """

    setup: Setup
    objective: Objective
    precision: Precision
    sum_in: SumIn
    budget: int | None
    collate: Callable[[list[Any]], Any] | None = None
    whole: Iterable[str] = ()
    dims: int | Mapping[str, int] | None = None
    need: Need | None = None

    def kind(self, rows: LogicalBatch) -> tuple[object, int]:
        """Return what a batch has in common with others that take as much a row, and how much its largest row holds.

        Batches of tensors are of one kind if their shapes differ in the rows only. Batches of a list are of one kind if
        their largest rows hold about as much, within a factor of the square root of two.
        """
        if self.collate is not None:
            largest = max((row_size(row) for row in rows.given), default=0)
            return math.ceil(2 * math.log2(max(1, largest))), largest
        one = rows.take(range(1))
        shapes = [
            (path, tuple(leaf.shape), leaf.dtype) for path, leaf, _ in flatten(one)[0] if isinstance(leaf, Tensor)
        ]
        return tuple(shapes), 0

    @rehearsal()
    def largest(self, rows: LogicalBatch, say: Say, *, timed: bool = True) -> int:
        """Return how many rows of a logical batch are to be taken at once.

        Args:
            rows: The logical batch. A few of its rows are run, and leave no trace.
            say: Takes the reasons.
            timed: Whether the fastest of the sizes that fit is looked for.

        Raises:
            OutOfMemoryError: The budget that was given does not hold one row.
        """
        self.need = None
        probe = self.probe_of(rows)
        budget, whose = self.budget_of()
        row = largest_row(probe.sample)
        need: Need | None
        try:
            need = self._need(probe, rows.rows, row, budget)
        except OverBudget:
            need = self._fake_need(probe, row)
            if need is None or not self._fits_whole(probe, rows.rows, row, budget - need.resident_bytes):
                self._refuse(need, budget, say)
                return 1
        self.need = need
        most = largest_rows(need, budget, rows.rows)
        for reason in probe.reasons:
            say(reason, logging.INFO)
        if most >= rows.rows:
            say(
                f'micro_batch="auto": the whole batch of {rows.rows} rows takes at most '
                f"{say_bytes(need.peak(rows.rows, alone=True))} of the {say_bytes(budget)} {whose}, so it is not cut.",
                logging.INFO,
            )
            return rows.rows
        if most == 0:
            self._refuse(need, budget, say)
            return 1
        layers = exact_layers(self.setup.model)
        if layers and self.setup.device.type == "cpu":
            return self._join(need, rows.rows, budget, layers[0], say)
        chosen, why = fastest_of(probe, evened(rows.rows, most), rows.rows, row) if timed else (most, "")
        chosen = evened(rows.rows, chosen)
        say(
            f'micro_batch="auto": the whole batch of {rows.rows} rows would take '
            f"{say_bytes(need.peak(rows.rows, alone=True))} of the {say_bytes(budget)} {whose}; it is cut into "
            f"micro-batches of {say_rows(chosen)}, which take {say_bytes(need.peak(chosen))}{why}.",
            logging.INFO,
        )
        return chosen

    @rehearsal()
    def peak(self, rows: LogicalBatch, cut: Sequence[Indices], lengths: Sequence[int] | None) -> tuple[int, int]:
        """Return what the largest micro-batch of a cut takes, and the budget. Unit: bytes.

        Args:
            rows: The logical batch.
            cut: Its micro-batches.
            lengths: Of each row, where they are known; then micro-batches of a list are padded to their own longest.
        """
        budget, _ = self.budget_of()
        alone = len(cut) == 1
        if lengths is None or self.collate is None:
            return self._takes(rows, len(max(cut, key=len)), alone=alone), budget
        most_tokens = max(cut, key=lambda part: len(part) * max(lengths[row] for row in part))
        longest_rows = cut[0]
        takes = [
            self._takes(LogicalBatch([rows.given[row] for row in part], collate=self.collate), len(part), alone=alone)
            for part in ([most_tokens] if most_tokens is longest_rows else [longest_rows, most_tokens])
        ]
        return max(takes), budget

    def _takes(self, rows: LogicalBatch, at_once: int, *, alone: bool) -> int:
        """Return what so many of some rows take at once, all of them as long as the longest. Unit: bytes."""
        probe = self.probe_of(rows)
        return self._need(probe, rows.rows, largest_row(probe.sample), None).peak(at_once, alone=alone)

    def probe_of(self, rows: LogicalBatch) -> Probe:
        """Return what looks at the rows of a logical batch."""
        sample = Sample(rows.given, self.collate, self.whole, self.dims)
        return Probe(self.setup, self.objective, self.precision, self.sum_in, sample)

    def budget_of(self) -> tuple[int, str]:
        """Return the budget, and how it is called. Unit: bytes."""
        if self.budget is not None:
            return self.budget, "of the budget"
        return held_bytes(self.setup) + available_bytes(self.setup.device), "that are free"

    def _need(self, probe: Probe, rows: int, row: int, budget: int | None) -> Need:
        """What training takes, from a few real rows.

        Raises:
            OverBudget: Not even one row stays within the budget.
        """
        resident, step = probe.beside()
        room = None if budget is None else budget - sum(resident.values())
        if room is not None and room < 0:
            raise OverBudget
        each, traces, hidden = self._first_trace(probe, rows, row, room)
        first, weights = traces[each, 0], weight_sizes(self.setup)
        need = Need(resident, Passes.of({**traces, (2 * each, 0): first.doubled(each, weights)}), step)
        if budget is not None:  # what so few rows take, as often as there are rows, is at least what these take
            share = need.peak(rows, alone=True) / max(1, usable(need, budget))
            if share <= (FAR if hidden or self.budget is None else 1):
                return need
        told = each == LOOK and (hidden or first.doubtful(each, weights) <= DOUBT)
        if budget is None or not told or largest_rows(need, budget, rows) < each:
            need = Need(resident, Passes.of(traces | self._second_trace(probe, each, row, room, first)), step)
        if budget is None or not hidden:
            return need
        share = need.peak(rows, alone=True) / max(1, usable(need, budget))
        if share <= FAR:
            return need
        # Kernels choose by size, so they are measured not far below what will be run.
        most = largest_rows(need, budget, rows)
        if most == 0:
            return need
        if most == 1:
            measured = probe.measure_one(row)
        else:
            looked, each = each, max(1, most // (2 if most < FEW else 4)) if share > CLOSE else each
            # Kernels are made ready for a number of rows when they first meet it, so near the first look it is its own.
            measured = probe.measure((LOOK if looked == LOOK <= each <= 2 * LOOK else each, 2 * each), row)
        if measured is None:
            return need
        need = replace(need, measured=measured)
        most = largest_rows(need, budget, rows)
        if share > CLOSE and 2 * each < most < FEW:
            measured = probe.measure((2 * each, most), row)
        return need if measured is None else replace(need, measured=measured)

    def _first_trace(
        self, probe: Probe, rows: int, row: int, room: int | None
    ) -> tuple[int, dict[Size, Trace], set[str]]:
        """What came and went with a few rows, as many as stay within what there is, and how many these are.

        Raises:
            OverBudget: Not even one does.
        """
        each = max(1, min(LOOK, rows // 8))
        for fewer in sorted({each, min(each, 2)} - {1}, reverse=True):
            try:
                return fewer, *probe.real_traces([(fewer, 0)], {0: row}, limit=room)
            except OverBudget:
                continue
        return 1, *probe.real_traces([(1, 0)], {0: row}, limit=room)

    def _second_trace(self, probe: Probe, each: int, row: int, room: int | None, first: Trace) -> dict[Size, Trace]:
        """The same with twice the rows, with half of them where that is too much, or what two would take at most."""
        for rows in (2 * each, each // 2) if each > 1 else (2,):
            try:
                return probe.real_traces([(rows, 0)], {0: row}, limit=room)[0]
            except OverBudget:
                continue
        return {(2, 0): first.doubled()}

    def _fits_whole(self, probe: Probe, rows: int, row: int, room: int) -> bool:
        """Whether the batch fits as its only micro-batch, which meets no gradient of an earlier one; tried for real."""
        try:
            _, hidden = probe.real_traces([(rows, 0)], {0: row}, limit=room, micro_batches=1)
        except OverBudget:
            return False
        return not hidden

    def _fake_need(self, probe: Probe, row: int) -> Need | None:
        """What training takes, without any real row; None where nobody can tell."""
        try:
            return probe.need([(2, 0), (4, 0)], {0: row}, limit=0)
        except Exception:
            return None

    def _join(self, need: Need, rows: int, budget: int, layer: str, say: Say) -> int:
        """Take all rows, since on a CPU graphs that are joined take as much however they are cut.

        Raises:
            OutOfMemoryError: That is more than the budget that was given.
        """
        found = (
            f"batch norm is exact in {layer}, so the graphs of all micro-batches are joined, and the logical batch of "
            f"{rows} rows takes {say_bytes(need.peak(rows, alone=True))} however it is cut; "
        )
        if self.budget is None:
            say(f'micro_batch="auto": {found}{say_bytes(budget)} are free by a careful count.', logging.WARNING)
            return rows
        raise OutOfMemoryError(
            f"{found[0].upper()}{found[1:]}the budget is {say_bytes(budget)}.",
            hint="take fewer rows, wb.checkpoint_blocks(model), or a norm that looks at one row at a time: "
            'wb.convert_batch_norm(model, to="group"). Nothing was trained.',
        )

    def _refuse(self, need: Need | None, budget: int, say: Say) -> None:
        """Say that one row is too much, as an error where a budget was given."""
        known = need is not None and need.peak(1) > usable(need, budget)
        takes = say_bytes(need.peak(1)) if need is not None and known else f"more than {say_bytes(budget)}"
        enough = f"{say_bytes(least_budget(need, 1))} or more" if need is not None and known else takes
        beside = f", of which {say_bytes(need.floor_bytes)} are weights, gradients and optimizer" if need else ""
        if self.budget is None:
            say(
                f'micro_batch="auto": a single row takes {takes}{beside}, and {say_bytes(budget)} are free by a '
                "careful count; it is tried row by row.",
                logging.WARNING,
            )
            return
        raise OutOfMemoryError(
            f"The budget of {say_bytes(budget)} does not hold one row: training takes {takes}{beside}.",
            hint=f"give {enough}, or take less: "
            'precision="bf16", wb.checkpoint_blocks(model), shorter rows, '
            "or an optimizer with less state; wb.plan shows what each would give. Nothing was trained.",
        )
