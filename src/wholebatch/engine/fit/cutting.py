"""How is a logical batch cut, and how after memory ran out? The rule that the user gave, the plan's, or a finer one."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from wholebatch.core.batch import LogicalBatch
from wholebatch.core.budget import say_bytes
from wholebatch.core.errors import OutOfMemoryError
from wholebatch.core.split import Indices, Rows, Size, Tokens, padding
from wholebatch.engine import memory as device_memory
from wholebatch.engine.fit.bylength import ByLength, pays, plan_by_length, varying_lengths
from wholebatch.engine.fit.fitting import Fitting
from wholebatch.engine.fit.lengths import lengths_of
from wholebatch.engine.fit.share import Share, no_finer
from wholebatch.engine.fit.watching import Watch
from wholebatch.engine.reasons import Say


@dataclass(slots=True)
class Place:
    """Where an attempt is.

    Attributes:
        rows: Rows of the micro-batch under way; None between and after them.
    """

    rows: int | None = None


@dataclass(frozen=True, slots=True)
class Shortage:
    """What is known of memory that ran out.

    Attributes:
        said: What PyTorch said, in a line.
        rows: Rows of the micro-batch in which it happened; None outside of any.
        elsewhere: Where it happened on other ranks only: to which sizes they had to go.
    """

    said: str
    rows: int | None
    elsewhere: list[Size] = field(default_factory=list)


class Cutting:
    """The rule by which logical batches are cut.

    A rule that was given becomes finer when memory runs out, and stays so. ``"auto"`` is planned for each kind of
    batch, becomes finer when memory runs out, and grows again towards the plan when that has passed.

    Args:
        micro_batch: As for `wb.Accumulator`.
        fitting: Knows how many rows fit.

    Attributes:
        micro_batch: The rule in force.
    """

    def __init__(self, micro_batch: Literal["auto"] | Rows | Tokens, fitting: Fitting) -> None:
        self.micro_batch = micro_batch
        self._fitting = fitting
        self._shares: dict[object, Share] = {}
        self._kind: object = None
        self._unsaid = micro_batch != "auto" and fitting.budget is not None
        self._by_length: ByLength | None = None
        self._by_rows = False
        self._watch = Watch(fitting.setup.device, fitting.budget is not None)

    def cut(self, rows: LogicalBatch, say: Say) -> tuple[list[Indices], float | None]:
        """Return the micro-batches of a logical batch, and the share of padding where lengths are known.

        Args:
            rows: The logical batch.
            say: Takes the reason of an automatic choice.

        Raises:
            OutOfMemoryError: A budget was given that does not hold one row.
        """
        if isinstance(self.micro_batch, Tokens):
            lengths = rows.lengths(self.micro_batch.length)
            cut = self.micro_batch.cut(lengths)
            if self._unsaid:
                self._say_whether_it_fits(rows, cut, lengths, say)
            return cut, padding(lengths, cut)
        if isinstance(self.micro_batch, Rows):
            cut = self.micro_batch.cut(rows.rows)
            if self._unsaid:
                self._say_whether_it_fits(rows, cut, None, say)
            return cut, None
        varying = None if self._by_rows else varying_lengths(self._fitting, rows)
        known = self._known(rows, varying, say) if varying is not None else None
        share = self._share(rows, say) if known is None else self._shares[self._kind]
        grown = share.grow()
        if grown:
            self._watch.look_again()
        if not self._eased(share, rows.rows, say if not grown else None) and grown:
            say(share.tried_again, logging.INFO)
        if known is not None and varying is not None:
            cut = known.cut(varying, share.rows if share.rows < share.asked else None)
            return cut, padding(varying, cut)
        return Rows(min(share.rows, rows.rows)).cut(rows.rows), None

    def take_finer(self, rows: LogicalBatch, cut: Sequence[Indices], shortage: Shortage, say: Say) -> None:
        """Make the rule finer, for this logical batch and for those that follow.

        Args:
            rows: The logical batch in which memory ran out.
            cut: Its micro-batches then.
            shortage: What is known of it.
            say: Takes the reason of the choice.

        Raises:
            OutOfMemoryError: A single row was too much, or memory ran out beside the rows.
        """
        several = [part for part in cut if len(part) > 1]
        if shortage.rows == 1 or not several:
            where = "in a micro-batch of one row" if shortage.rows == 1 else "outside of any micro-batch"
            raise no_finer(where, shortage.said)
        before = self.micro_batch
        finer: Rows | Tokens
        if isinstance(before, Tokens):
            lengths = rows.lengths(before.length)
            largest = max(len(part) * max(lengths[row] for row in part) for part in several)
            finer = self.micro_batch = Tokens(max(1, min(before.tokens, largest)), before.length).halved()
        elif before == "auto" and self._shares[self._kind].unit == "tokens":
            lengths = lengths_of(rows.given) or [1] * rows.rows
            largest = max(len(part) * max(lengths[row] for row in part) for part in several)
            finer = Tokens(largest, len).halved()
            share = self._shares[self._kind]
            share.asked = share.planned = max(share.asked, largest)
            share.shrink(largest, finer.tokens)
        else:
            at_once = max(map(len, several))
            finer = Rows(at_once).halved()
            if before == "auto":
                self._shares[self._kind].shrink(at_once, finer.rows)
            else:
                self.micro_batch = finer
        was = "the whole batch" if before == "auto" and len(cut) == 1 else f"{max(map(len, several))} rows"
        was = str(before) if isinstance(before, Tokens) else was
        say(
            f"Memory ran out with {was} at once ({shortage.said}): this logical batch and those that follow are cut "
            f"into micro-batches of {finer}.",
            logging.WARNING,
        )

    @property
    def size(self) -> Size:
        """How large micro-batches are now."""
        if isinstance(self.micro_batch, Tokens):
            return "tokens", self.micro_batch.tokens
        if isinstance(self.micro_batch, Rows):
            return "rows", self.micro_batch.rows
        share = self._shares[self._kind]
        return share.unit, share.rows

    def follow(self, sizes: Sequence[Size], say: Say) -> None:
        """Take micro-batches no larger than those to which ranks had to go when memory ran out.

        Args:
            sizes: What each of them takes from now on.
            say: Takes the reason of the choice.
        """
        before: object = self.micro_batch
        share = self._shares.get(self._kind) if before == "auto" else None
        for unit, most in sizes:
            if isinstance(self.micro_batch, Tokens) and unit == "tokens" and most < self.micro_batch.tokens:
                self.micro_batch = Tokens(most, self.micro_batch.length)
            elif isinstance(self.micro_batch, Rows) and unit == "rows" and most < self.micro_batch.rows:
                self.micro_batch = Rows(most)
            elif share is not None and unit == share.unit and most < share.rows:
                share.shrink(share.rows, most)
                before = None
        if self.micro_batch is not before:
            say(
                "Memory ran out on another rank: this logical batch and those that follow are cut into micro-batches "
                f"of {self.size[1]} {self.size[0]} here too.",
                logging.WARNING,
            )

    def _eased(self, share: Share, rows: int, say: Say | None) -> bool:
        """Take fewer rows before memory runs out, where it is seen to get short; return whether that was so."""
        at_once = min(share.rows, rows) if share.unit == "rows" else share.rows
        why = self._watch.short(share.takes(at_once, rows))
        if why is None or at_once < 2:
            return False
        fewer, free = -(-at_once // 2), self._watch.free
        # Half of what is free, since an allocator reserves more than is used, and the kernel kills who goes beyond.
        while free is not None and fewer > 1 and (share.takes(fewer, rows) or 0) > free // 2:
            fewer = -(-fewer // 2)
        share.clean, share.rows = 0, fewer
        if say is not None:
            say(f"{why}: micro-batches of {fewer} {share.unit} are taken.", logging.WARNING)
        return True

    def _known(self, rows: LogicalBatch, lengths: Sequence[int], say: Say) -> ByLength | None:
        """How many rows of each length fit; None where that does not pay, or cannot be found out."""
        known = self._by_length
        if known is None and not pays(lengths):
            return None
        if known is None or max(lengths) > known.reach:
            try:
                known = plan_by_length(self._fitting, rows, lengths, say, timed=not self._shares)
                self._watch.forget()
            except Exception as error:  # by rows it may be found out, or said why not
                if device_memory.is_out_of_memory(error):
                    device_memory.free_cached(self._fitting.setup.device)
                known = None
            self._by_rows = known is None
            self._by_length = known
            if known is None:
                return None
        self._kind = "by length"
        if self._kind not in self._shares:
            most = len(lengths) * max(lengths)
            self._shares[self._kind] = Share(most, most, 0, most, unit="tokens")
        return known

    def _share(self, rows: LogicalBatch, say: Say) -> Share:
        """How many rows of a batch like this are taken at once; planned when the first of its kind comes by."""
        self._kind, holds = self._fitting.kind(rows)
        known = self._shares.get(self._kind)
        if known is not None and known.speaks_for(rows.rows, holds):
            return known
        planned: int | None = None
        try:
            planned = self._fitting.largest(rows, say, timed=not self._shares)
        except OutOfMemoryError:
            raise
        except Exception as error:
            if device_memory.is_out_of_memory(error):
                device_memory.free_cached(self._fitting.setup.device)
            said = device_memory.in_a_line(error)[:160]
            say(
                f'micro_batch="auto" takes the whole batch of {rows.rows} rows at once and halves it when memory runs '
                f"out, since a few rows could not be run to plan it ({type(error).__name__}: {said}).",
                logging.WARNING,
            )
        most = rows.rows if planned is None else planned
        self._shares[self._kind] = Share(rows.rows, planned, holds, most, need=self._fitting.need)
        self._watch.forget()
        return self._shares[self._kind]

    def _say_whether_it_fits(
        self, rows: LogicalBatch, cut: Sequence[Indices], lengths: Sequence[int] | None, say: Say
    ) -> None:
        self._unsaid = False
        try:
            takes, budget = self._fitting.peak(rows, cut, lengths)
        except Exception as error:
            say(f"Whether the micro-batch fits was not found out: {type(error).__name__}.", logging.INFO)
            return
        fits = takes <= budget
        say(
            f"Micro-batches of {self.micro_batch} take {say_bytes(takes)}, "
            + (
                f"within the {say_bytes(budget)} of the budget."
                if fits
                else f'more than the {say_bytes(budget)} of the budget; micro_batch="auto" would keep to it.'
            ),
            logging.INFO if fits else logging.WARNING,
        )
