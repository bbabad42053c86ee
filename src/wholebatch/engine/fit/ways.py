"""How could this be trained, and what would each way take? Followed tensor by tensor, and tried where it can be."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from wholebatch.core.budget import say_bytes, say_rows
from wholebatch.core.errors import OutOfMemoryError
from wholebatch.core.need import Need, Passes
from wholebatch.core.sizes import largest_rows
from wholebatch.core.trace import Size
from wholebatch.core.ways import Block, Way, by_worth
from wholebatch.engine import memory
from wholebatch.engine.fit.blocks import Ledger
from wholebatch.engine.fit.checkpointing import find_blocks, recomputing
from wholebatch.engine.fit.offloading import HOSTED, offloading
from wholebatch.engine.fit.probe import Probe
from wholebatch.engine.fit.resident import held_bytes
from wholebatch.engine.fit.room import available_bytes
from wholebatch.engine.fit.timeline import OverBudget
from wholebatch.engine.precision import Precision

LOOK = 8
"""So many rows are looked at, and twice as many, where that keeps to the budget."""

MEASURED = 32
"""Real runs are made with at most so many rows, and with twice as many."""

SMALL = 0.002
"""What kernels take for themselves is looked at with fewer rows too where it is more than this share of all."""

BACKWARD = 2.0
"""A backward pass takes about so many times as long as its forward pass."""


class Ways:
    """Looks at the ways to train one job.

    Args:
        probe: Looks at what the job takes; gets the reasons of the way as it is.
        rows: Of a logical batch.
        rows_of: For each length that is looked at a row of the sample that is so long.
        budget: What there is; None: what the device has free. Unit: bytes.

    Attributes:
        budget: What there is, known after `plain`. Unit: bytes.
        names: Of the blocks that could recompute.
    """

    def __init__(self, probe: Probe, rows: int, rows_of: Mapping[int, int], budget: int | None) -> None:
        self._probe = probe
        self._rows = rows
        self._rows_of = rows_of
        self._given = budget
        self._longest = max(rows_of)
        self._each = LOOK
        self._scratch: bool | None = None
        self._ranked: list[Block] | None = None
        self._total = 0.0
        self.budget = budget or 0
        self.names = find_blocks(probe.setup.model)

    def plain(self) -> Way:
        """Return the way as it is."""
        probe = self._probe
        need = self._look(probe, self._rows_of)
        if self._given is None:
            self.budget = available_bytes(probe.device) + held_bytes(probe.setup)
            probe.reasons.append(
                f"No budget was given: {say_bytes(self.budget)} is what this machine leaves to training."
            )
        self._plain = need = self._measured(probe, need)
        if need.measured is not None:
            low, high = need.measured.rows
            self._scratch = any(need.scratch(rows, self._longest) > SMALL * need.peak(rows) for rows in (low, high))
        return Way("as it is", need)

    def narrower(self) -> Way | None:
        """Return the way in 16 bits, where weights have 32 and the passes too."""
        probe = self._probe
        model = probe.setup.model
        if not probe.precision.as_is or all(each.element_size() != 4 for each in model.parameters()):
            return None
        return self._way(Way("bf16", self._plain), self._like(Precision("bf16", probe.device)))

    def recomputing(self, count: int) -> Way | None:
        """Return the way in which so many blocks recompute: those that free most for their time.

        Returns:
            None where it cannot be followed, or no block could.
        """
        if not count:
            return None
        if count == len(self.names) and self._ranked is None:
            chosen, slower, why = tuple(self.names), 1 + 1 / (1 + BACKWARD), ""
        else:
            ranked = self._order()
            first = {each.name for each in ranked[:count]}
            chosen = tuple(name for name in self.names if name in first)
            slower, why = self.guess(count)[1], _why(ranked, count)
        return self._way(Way("checkpointing", self._plain, chosen, slower, why=why), self._like(self._probe.precision))

    def guess(self, count: int) -> tuple[float, float]:
        """Return what so many blocks free of a row at most, as far as is known, and by what factor a pass takes longer.

        Returns:
            The first in bytes.
        """
        first = self._order()[:count]
        if not self._total:
            return float("inf"), 1 + count / len(self.names) / 3
        again = sum(each.seconds for each in first)
        return sum(each.kept_bytes for each in first), 1 + again / ((1 + BACKWARD) * self._total)

    def fully(self, way: Way) -> Way | None:
        """Return a way that was looked at with the longest rows, as it is for rows of any length."""
        if len(self._rows_of) == 1:
            return way
        found = self._way(way, self._like(self._probe.precision), self._rows_of)
        return found and replace(found, notes=way.notes)

    def offloaded(self) -> Way | None:
        """Return the way that keeps activations on the host; None where the device has no memory of its own."""
        if self._probe.device.type not in HOSTED:
            return None
        return self._way(Way("offload", self._plain, slower=2.0, offload=True), self._like(self._probe.precision))

    def _way(self, way: Way, probe: Probe, rows_of: Mapping[int, int] | None = None) -> Way | None:
        """Follow a way, and run it for real where kernels take memory for themselves or nobody knows.

        Args:
            way: What is known of it.
            probe: Looks at it.
            rows_of: At which rows, by their length; None: the longest alone, which tell whether it is worth more.
        """
        with self._as_in(way):
            try:
                need = self._look(probe, rows_of or {self._longest: self._rows_of[self._longest]})
            except Exception as error:
                self._leave_out(way, f"it cannot be followed ({memory.kind_in_a_line(error)}).")
                return None
            if not need.passes.exact:
                why = probe.reasons[-1] if probe.reasons else "It takes other turns with other numbers of rows."
                self._leave_out(way, f"what it takes does not follow from a few rows. {why}")
                return None
            if self._scratch is not False:
                need = self._measured(probe, need)
        return replace(way, need=need, notes=tuple(probe.reasons))

    def _leave_out(self, way: Way, why: str) -> None:
        """Say once why a way is left out."""
        said = f"{way.name} is not offered: {why}"
        if said not in self._probe.reasons:
            self._probe.reasons.append(said)

    @contextmanager
    def _as_in(self, way: Way) -> Iterator[None]:
        model = self._probe.setup.model
        with recomputing(model, way.blocks), offloading(model) if way.offload else nullcontext():
            yield

    def _like(self, precision: Precision) -> Probe:
        return replace(self._probe, precision=precision, reasons=[])

    def _order(self) -> Sequence[Block]:
        """The blocks, those first that free most for a second of computing."""
        if self._ranked is None:
            try:
                self._ranked = by_worth(self._watched())
            except Exception as error:  # then all count alike, and the earlier ones come first
                self._probe.reasons.append(f"What each block keeps was not seen ({type(error).__name__}).")
                self._ranked = [Block(name, "", 0, 0.0) for name in self.names]
        return self._ranked

    def _watched(self) -> list[Block]:
        probe, row = self._probe, self._rows_of[self._longest]
        rows = min(8, self._rows) if self._plain.peak(8, self._longest) < self.budget else 1
        ledger = Ledger(probe.setup.model, self.names, probe.device)
        self._total = probe.watch(rows, row, ledger)
        return ledger.blocks(rows)

    def _look(self, probe: Probe, rows_of: Mapping[int, int]) -> Need:
        """Follow a way, on real rows where fake tensors do not get through: so many that they keep to the budget.

        Raises:
            OutOfMemoryError: Then not even one real row does, nor would it fit into what the machine has free.
        """
        each = max(1, min(self._each, self._rows // 4))
        reasons = tuple(probe.reasons)
        limits = [(rows, self._given) for rows in sorted({each, min(each, 2), 1}, reverse=True)]
        for rows, limit in [*limits, (1, available_bytes(probe.device))]:
            probe.reasons[:] = reasons
            sizes: list[Size] = [(size, length) for length in rows_of for size in (rows, 2 * rows)]
            try:
                need = probe.need(sizes, rows_of, limit=limit)
            except OverBudget:
                continue
            self._each = rows
            return need
        raise OutOfMemoryError(
            f"{probe.reasons[-1]} It took more than the {say_bytes(available_bytes(probe.device))} that are free.",
            hint="plan with a smaller model or shorter rows, or make the loss one that reads no numbers (.item()).",
        )

    def _measured(self, probe: Probe, need: Need) -> Need:
        """Add what two small real runs take beyond what the tensors explain, where two small runs fit."""
        longest, budget = self._longest, self.budget
        most = largest_rows(need, budget, self._rows, longest)
        each = max(4, min(MEASURED, most // 4))  # kernels choose by size: not far below what will be run
        room = min(budget, available_bytes(probe.device) + need.resident_bytes)
        # Of a few rows twice as many may be nearly all that fit: kernels go other ways for one row than for five.
        while each > 1 and need.peak(2 * each, longest) > (room / 2 if each > 4 else room):
            each //= 2
        row = self._rows_of[longest]
        if need.peak(1, longest) > room:
            probe.reasons.append("No real row was run: not even one would fit.")
            return need
        single = need.peak(2 * each, longest) > room
        try:
            found = probe.measure_one(row) if single else probe.measure((each, 2 * each), row)
        except Exception as error:
            if not memory.is_out_of_memory(error) and each > 1:  # batch norm takes no single row
                raise
            probe.reasons.append(
                f"A small real run ended with {type(error).__name__}, so the plan is that of the tensors alone."
            )
            return need
        if found is None:
            probe.reasons.append("What kernels take for themselves was not measured: nobody can tell here.")
            return need
        made = replace(need, measured=found, at=longest)
        if not single and made.scratch(each, longest) > SMALL * made.peak(each, longest):
            made = replace(made, smaller=self._smaller(probe, each, found))
        top = 1 if single else 2 * each
        more = made.scratch(top, longest)
        share = 100 * abs(more) / max(1, made.peak(top, longest))
        told = "agree with it to the byte"
        if more:
            told = f"took {say_bytes(abs(more))} {'more' if more > 0 else 'less'} ({share:.2g} %), which is counted"
        probe.reasons.append(
            f"The model was followed tensor by tensor, and real runs with "
            f"{say_rows(1) if single else f'{each} and {2 * each} rows'} {told}."
        )
        return made

    def _smaller(self, probe: Probe, each: int, found: Passes) -> tuple[Passes, ...]:
        """Measure fewer rows as well, since kernels that take memory for themselves take it in steps."""
        row = self._rows_of[self._longest]
        made: list[Passes] = []
        more = each, found.traces[each, 0]
        for fewer in sorted({each // 2, each // 4} - {0}, reverse=True):
            try:
                less = probe.measure((fewer,), row)
            except Exception as error:
                if not memory.is_out_of_memory(error) and fewer > 1:  # batch norm takes no single row
                    raise
                less = None
            if less is None:
                break
            trace = less.traces[fewer, 0]
            made.append(Passes.of({(fewer, 0): trace, (more[0], 0): more[1]}))
            more = fewer, trace
        return tuple(made)


def _why(ranked: Sequence[Block], count: int) -> str:
    """What speaks for the first of some blocks."""
    last, rest = ranked[count - 1], ranked[count:]
    if not last.seconds or not last.kept_bytes:
        return ""
    said = f"Each of these frees at least {_worth(last)} of computing it anew"
    if not rest:
        return f"{said}."
    if _worth(rest[0]) == _worth(last):
        return f"{said}; so do others, but what the last blocks keep is needed first, so the earlier ones are taken."
    return f"{said}, any other at most {_worth(rest[0])}."


def _worth(block: Block) -> str:
    return f"{say_bytes(block.kept_bytes / block.seconds / 1000) if block.seconds else '0 B'} for a millisecond"
