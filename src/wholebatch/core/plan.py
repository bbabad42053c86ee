"""What was planned? The record of a plan, as an object, a table, JSON and a picture."""

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from wholebatch.core.applied import Applied
from wholebatch.core.budget import say_bytes, say_rate, say_rows
from wholebatch.core.communication import Ranks
from wholebatch.core.errors import ConfigError, OutOfMemoryError
from wholebatch.core.need import Need
from wholebatch.core.picture import Picture
from wholebatch.core.split import Rows, Tokens


@dataclass(frozen=True, slots=True)
class Alternative:
    """What another way to train would take.

    Attributes:
        name: ``"bf16"``, ``"checkpointing"`` or ``"AdamA"``.
        largest_rows: The most rows that would fit at once; 0: none.
        peak_bytes: What training would take with that many. Unit: bytes.
        slower: By what a pass would take longer, about, as a factor.
    """

    name: str
    largest_rows: int
    peak_bytes: int
    slower: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a logical batch is trained within a budget of memory, and why so. Made by `wb.plan`.

    Attributes:
        fits: Whether it can be trained within the budget at all.
        micro_batch: What is in memory at once.
        micro_batches: How many make a logical batch; on several ranks, those of each.
        peak_bytes: What training will take at most. Unit: bytes.
        budget_bytes: What there is. Unit: bytes.
        logical_batch: Rows of a logical batch, over all ranks.
        longest: Tokens of the longest row; 0 where rows have no length.
        precision: In which forward passes run.
        checkpointing: Which blocks must recompute their activations; empty: none. `apply` sees to it.
        offload: Whether activations must wait in the host's memory; `apply` sees to it.
        memory: What is live at the highest moment, by kind; adds up to `peak_bytes`. Unit: bytes.
        bytes_per_row: What one row more keeps until its backward pass. Unit: bytes.
        seconds: Time of a window without its step, where passes were timed; on several ranks with what is exposed of
            the reduction, where the bandwidth is known. Unit: seconds.
        timed: Time of a pass by its rows, where passes were timed. Unit: seconds.
        alternatives: What other ways to train would take.
        reasons: Why it is planned so, and how it is known; one sentence each.
        need: What training takes at any size.
        ranks: What a window takes on several ranks; None on one.
        hand: What applies it.

    Example:
        >>> from wholebatch.core.need import Passes
        >>> from wholebatch.core.trace import Trace
        >>> from wholebatch.core.planner import Planner, Task
        >>> from wholebatch.core.ways import Way
        >>> def run(rows):
        ...     kinds = ("activations", "gradients", "activations", "activations", "activations")
        ...     return Trace((50 * rows, 100, -50 * rows, 50 * rows, -50 * rows), kinds, 3)
        >>> need = Need({"weights": 100}, Passes.of({(2, 0): run(2), (4, 0): run(4)}), 100)
        >>> plan = Planner(Task(rows=64, budget=1000), [Way("as it is", need)]).plan()
        >>> plan.micro_batch, plan.micro_batches, plan.peak_bytes, plan.largest(), plan.peak_at(64)
        (Rows(rows=13), 5, 850, 16, 3400)
    """

    fits: bool
    micro_batch: Rows | Tokens
    micro_batches: int
    peak_bytes: int
    budget_bytes: int
    logical_batch: int
    longest: int
    precision: str
    checkpointing: tuple[str, ...]
    memory: Mapping[str, int]
    bytes_per_row: float
    seconds: float | None
    timed: Mapping[int, float]
    alternatives: tuple[Alternative, ...]
    reasons: tuple[str, ...]
    need: Need = field(repr=False)
    ranks: Ranks | None = None
    offload: bool = False
    hand: "Callable[[Plan, Any], Applied] | None" = field(default=None, repr=False, compare=False)

    @property
    def share(self) -> int:
        """Rows of a logical batch that one rank has at most; on one rank, all of them."""
        return self.ranks.rows if self.ranks is not None else self.logical_batch

    def on(self, ranks: Ranks, logical_batch: int) -> "Plan":
        """Return the plan of several ranks, of which this is one.

        Args:
            ranks: What they take together.
            logical_batch: Rows of a logical batch, over all ranks.
        """
        window = ranks.window_seconds if ranks.window_seconds is not None else self.seconds
        reasons = (*self.reasons, *ranks.reasons())
        return replace(self, logical_batch=logical_batch, seconds=window, ranks=ranks, reasons=reasons)

    def apply(self, model: Any) -> Applied:
        """Let a model train as planned: blocks of `checkpointing` recompute, activations wait on the host if they must.

        Most plans change nothing. Cutting is the accumulator's: ``wb.Accumulator(..., micro_batch=plan.micro_batch)``.

        Args:
            model: The one that was planned, or another like it. Changed in place; names and values of parameters stay.

        Returns:
            What was done; its ``undo()`` takes it back, and so does the end of a ``with`` block.

        Raises:
            OutOfMemoryError: The plan says that it does not fit.
            ConfigError: The model has no such blocks.
        """
        if not self.fits:
            raise OutOfMemoryError(
                f"The plan cannot be applied, since it does not fit: {self.reasons[0]}",
                hint="plan.alternatives and plan.reasons say what would help.",
            )
        if self.hand is None:
            raise ConfigError("This plan was made from figures alone.", hint="let wb.plan make it from the model.")
        return self.hand(self, model)

    @property
    def bytes_per_token(self) -> float | None:
        """What one token more keeps until its backward pass, at the longest row; None where rows have no length."""
        return self.bytes_per_row / self.longest if self.longest else None

    @property
    def rows_per_second(self) -> float | None:
        """The speed of forward and backward passes, where they were timed. Unit: rows a second."""
        return self.logical_batch / self.seconds if self.seconds else None

    def peak_at(self, rows: int, length: int | None = None) -> int:
        """Return what training would take with another micro-batch.

        Args:
            rows: Of a micro-batch; with all rows of the logical batch nothing is cut.
            length: Of each row, padded; None: the longest.

        Returns:
            Unit: bytes.
        """
        return self.need.peak(rows, self.longest if length is None else length, alone=rows >= self.share)

    def fits_at(self, rows: int, length: int | None = None) -> bool:
        """Return whether a micro-batch of so many rows stays within the budget."""
        return self.peak_at(rows, length) <= self.budget_bytes

    def largest(self) -> int:
        """Return the most rows that stay within the budget at once; 0: not even one."""
        low, high = 0, self.share
        if self.fits_at(high):
            return high
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits_at(middle) else (low, middle - 1)
        return low

    def epoch_seconds(self, rows: int) -> float | None:
        """Return how long an epoch takes, without its steps.

        Args:
            rows: Of the epoch.

        Returns:
            None where passes were not timed. Unit: seconds.
        """
        return self.seconds * rows / self.logical_batch if self.seconds is not None else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything that JSON can hold."""
        amount: dict[str, int] = (
            {"rows": self.micro_batch.rows}
            if isinstance(self.micro_batch, Rows)
            else {"tokens": self.micro_batch.tokens}
        )
        return {
            "fits": self.fits,
            "micro_batch": amount,
            "micro_batches": self.micro_batches,
            "logical_batch": self.logical_batch,
            "longest": self.longest,
            "peak_bytes": self.peak_bytes,
            "budget_bytes": self.budget_bytes,
            "largest_rows": self.largest(),
            "memory": dict(self.memory),
            "bytes_per_row": self.bytes_per_row,
            "bytes_per_token": self.bytes_per_token,
            "precision": self.precision,
            "checkpointing": list(self.checkpointing),
            "offload": self.offload,
            "seconds": self.seconds,
            "rows_per_second": self.rows_per_second,
            "timed": {str(rows): seconds for rows, seconds in self.timed.items()},
            "alternatives": [
                {
                    "name": each.name,
                    "largest_rows": each.largest_rows,
                    "peak_bytes": each.peak_bytes,
                    "slower": each.slower,
                }
                for each in self.alternatives
            ],
            "ranks": self.ranks.to_dict() if self.ranks is not None else None,
            "reasons": list(self.reasons),
        }

    def __str__(self) -> str:
        lines = [self._headline(), ""]
        lines += _columns([(name, value, "") for name, value in self._kinds()])
        lines += ["", "Another way:"] if self.alternatives else []
        lines += _columns([(each.name, say_bytes(each.peak_bytes), _rows(each)) for each in self.alternatives])
        if self.ranks is not None:
            lines += ["", f"{self.ranks.heading}:", *_columns(self.ranks.table())]
            lines += ["", "Weights, gradients and optimizer state:", *_columns(self.ranks.sharing_table())]
        lines += ["", *(f"- {reason}" for reason in self.reasons)]
        return "\n".join(lines)

    def _headline(self) -> str:
        if not self.fits:
            single = self.micro_batch == Rows(1)
            what = "a single row" if single else f"a micro-batch of {_amount(self.micro_batch)}"
            return f"It does not fit: {say_bytes(self.peak_bytes)} of {say_bytes(self.budget_bytes)} for {what}."
        parts = (
            "nothing is cut"
            if self.micro_batches == 1
            else f"{self.micro_batches} micro-batches of {_amount(self.micro_batch)}"
        )
        ranks = f"{self.share} on each of {self.ranks.ranks} ranks, " if self.ranks is not None else ""
        speed = f", {say_rate(self.rows_per_second)} rows a second" if self.rows_per_second else ""
        return (
            f"It fits: {self.logical_batch} rows, {ranks}{parts}, {self.precision}{self._beside()}, "
            f"{say_bytes(self.peak_bytes)} of {say_bytes(self.budget_bytes)}{speed}."
        )

    def _beside(self) -> str:
        said = f", {_count(len(self.checkpointing), 'block')} recomputed" if self.checkpointing else ""
        return said + (", activations on the host" if self.offload else "")

    def _kinds(self) -> list[tuple[str, str]]:
        kinds = [(name, say_bytes(size)) for name, size in self.memory.items()]
        kinds += [("in all", say_bytes(self.peak_bytes)), ("a row more", say_bytes(self.bytes_per_row))]
        if self.bytes_per_token is not None:
            kinds.append(("a token more", say_bytes(self.bytes_per_token)))
        return kinds

    def _repr_html_(self) -> str:
        """A table and a picture, for notebooks."""
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td style='text-align:right'>{html.escape(value)}</td></tr>"
            for name, value in self._kinds()
        )
        if self.ranks is not None:
            rows += "".join(
                f"<tr><td>{html.escape(name)}</td><td style='text-align:right'>{html.escape(value)}</td></tr>"
                for name, value, _ in [*self.ranks.table(), *self.ranks.sharing_table()]
            )
        reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in self.reasons)
        return (
            f"<div><p><b>{html.escape(self._headline())}</b></p><table>{rows}</table>"
            f"{self.to_svg()}<ul>{reasons}</ul></div>"
        )

    def to_svg(self, measured: Mapping[int, int] | None = None) -> str:
        """Return a picture of memory against the micro-batch, kind upon kind, with the budget as a line.

        Args:
            measured: Peaks that were measured, by the rows of a micro-batch; they are marked. Unit: bytes.
        """

        def kinds(rows: int) -> Mapping[str, int]:
            return self.need.by_kind(rows, self.longest, alone=rows >= self.share)

        most = max(2, min(self.share, 2 * max(1, self.largest())))
        chosen = self.micro_batch.rows if self.fits and isinstance(self.micro_batch, Rows) else None
        return Picture(kinds, most, self.budget_bytes, chosen, self.longest, measured or {}).svg()


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _amount(micro_batch: Rows | Tokens) -> str:
    return say_rows(micro_batch.rows) if isinstance(micro_batch, Rows) else str(micro_batch)


def _rows(alternative: Alternative) -> str:
    held = f"at most {say_rows(alternative.largest_rows)} at once" if alternative.largest_rows else "not even one row"
    return held + (f", {alternative.slower:.2f} times as long" if alternative.slower > 1 else "")


def _columns(rows: list[tuple[str, str, str]]) -> list[str]:
    names, values = (max((len(row[at]) for row in rows), default=0) for at in (0, 1))
    return [f"  {name:<{names}}  {value:>{values}}  {more}".rstrip() for name, value, more in rows]
