"""How many rows of each length fit at once? Planned from rows of three lengths, kept for every batch that follows."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from wholebatch.core.batch import LogicalBatch
from wholebatch.core.budget import say_bytes, say_rows
from wholebatch.core.need import Need, Passes
from wholebatch.core.sizes import largest_rows, usable
from wholebatch.core.split import Indices, Rows, cut_by_length, padding
from wholebatch.core.trace import Size, Trace
from wholebatch.engine.batchnorm import batch_dependent_layers
from wholebatch.engine.fit.fitting import Fitting
from wholebatch.engine.fit.lengths import lengths_of
from wholebatch.engine.fit.probe import Probe
from wholebatch.engine.fit.timeline import OverBudget
from wholebatch.engine.fit.timing import fastest_of
from wholebatch.engine.reasons import Say

STEPS = 4
"""Between a length and its double, so many are told apart."""

REACH = 1.25
"""How much longer than those that were looked at rows may be."""

WORTH = 0.05
"""Rows are sorted by length where that saves more than this share of the padded tokens."""


@dataclass
class ByLength:
    """How many rows of a length fit at once.

    Attributes:
        need: What training takes, by rows and length.
        budget: Unit: bytes.
        longest: The longest row that was looked at. Unit: tokens.
        tokens: The most padded tokens that are taken at once, since more are no faster.
    """

    need: Need
    budget: int
    longest: int
    tokens: int
    _known: dict[int, int] = field(default_factory=dict)

    @property
    def reach(self) -> int:
        """The longest row for which it is known what it takes: a little longer than any that was looked at, where every
        moment is known by itself, as a polynomial in the length. Unit: tokens."""
        return int(REACH * self.longest) if self.need.passes.exact and self.need.measured is None else self.longest

    def cut(self, lengths: Sequence[int], tokens: int | None = None) -> list[Indices]:
        """Return the micro-batches of rows of some lengths: all rows at once where they fit.

        Args:
            lengths: Of each row.
            tokens: The most padded tokens at once, where memory ran out with more.
        """
        if tokens is None:
            if self.need.peak(len(lengths), max(lengths), alone=True) <= usable(self.need, self.budget):
                return [range(len(lengths))]
            return cut_by_length(lengths, self.most, max(lengths) * self.most(max(lengths)))
        return cut_by_length(lengths, lambda length: min(self.most(length), tokens // max(1, length)), tokens)

    def most(self, length: int) -> int:
        """Return how many rows of a length fit at once; 0: not even one."""
        alike = min(max(length, self.longest), math.ceil(2 ** (math.ceil(STEPS * math.log2(max(1, length))) / STEPS)))
        if alike not in self._known:
            self._known[alike] = largest_rows(self.need, self.budget, 1 << 20, alike)
        return min(self._known[alike], max(1, self.tokens // max(1, length)))


def varying_lengths(fitting: Fitting, rows: LogicalBatch) -> list[int] | None:
    """Return the lengths of a batch's rows where they can be told and rows may be sorted by them; None elsewhere.

    Args:
        fitting: What is trained, and how rows are collated.
        rows: The logical batch.
    """
    if fitting.collate is None or rows.rows < 4:
        return None
    lengths = lengths_of(rows.given)
    # Statistics of rows of like length are not those of rows in any order.
    return None if lengths is None or batch_dependent_layers(fitting.setup.model) else lengths


def pays(lengths: Sequence[int]) -> bool:
    """Return whether sorting rows by length saves a good part of the padded tokens."""
    parts = Rows(max(2, len(lengths) // 4)).cut(len(lengths))
    return padding(lengths, parts) - padding(sorted(lengths), parts) >= WORTH


def plan_by_length(
    fitting: Fitting, rows: LogicalBatch, lengths: Sequence[int], say: Say, *, timed: bool
) -> ByLength | None:
    """Return how many rows of each length fit, from passes of a few rows that leave no trace.

    Args:
        fitting: Knows the budget.
        rows: The logical batch.
        lengths: Of its rows.
        say: Takes the reasons.
        timed: Whether the fastest of some sizes is looked for.

    Returns:
        None where a row of the longest does not fit, or what padded rows take does not follow from their length.

    Raises:
        OverBudget: A few rows pass the budget.
    """
    probe = fitting.probe_of(rows)
    budget, whose = fitting.budget_of()
    order = sorted(range(rows.rows), key=lengths.__getitem__)
    rows_of = {lengths[row]: row for row in (order[0], order[len(order) // 2], order[-1])}
    longest = max(rows_of)
    resident, step = probe.beside()
    room = budget - sum(resident.values())
    traces, hidden = _traces(probe, rows_of, room)
    need = Need(resident, Passes.of(traces), step, at=longest)
    if hidden:
        many = sorted({each for each, _ in traces})
        measured = probe.measure(many, rows_of[longest]) if many[0] > 1 else probe.measure_one(rows_of[longest])
        need = need if measured is None else replace(need, measured=measured)
    made = ByLength(need, budget, longest, 1 << 62)
    most = made.most(longest)
    if most == 0:
        return None
    whole = len(made.cut(lengths)) == 1
    why = ""
    if timed and not whole:
        tried = min(most, rows.rows)
        chosen, said = fastest_of(probe, tried, rows.rows, rows_of[longest])
        if chosen < tried:
            made.tokens, why = chosen * longest, f", of which {say_rows(chosen)} are faster{said}"
    if whole:
        say(
            f'micro_batch="auto": the whole batch of {rows.rows} rows, padded to {longest}, takes at most '
            f"{say_bytes(need.peak(rows.rows, longest, alone=True))} of the {say_bytes(budget)} {whose}, so it is not "
            "cut.",
            logging.INFO,
        )
    else:
        shortest = min(rows_of)
        say(
            f'micro_batch="auto": rows are sorted by their lengths of {shortest} to {longest}; of the '
            f"{say_bytes(budget)} {whose}, micro-batches take what {say_rows(most)} of the longest do{why}, and up to "
            f"{say_rows(min(rows.rows, made.most(shortest)))} of the shortest.",
            logging.INFO,
        )
    return made


def _traces(probe: Probe, rows_of: Mapping[int, int], room: int) -> tuple[dict[Size, Trace], set[str]]:
    """What came and went with two and four rows of each length, or with as many as stay within what there is.

    Raises:
        OverBudget: Not even one row of each does.
    """
    for each in (2, 1):
        try:
            sizes = [(many, length) for length in rows_of for many in (each, 2 * each)]
            return probe.real_traces(sizes, rows_of, limit=room)
        except OverBudget:
            continue
    traces, hidden = probe.real_traces([(1, length) for length in rows_of], rows_of, limit=room)
    return {**traces, **{(2, length): trace.doubled() for (_, length), trace in traces.items()}}, hidden
