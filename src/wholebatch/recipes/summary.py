"""What was achieved? The outcome of a run, and the one line that says it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from wholebatch.evidence.wording import number, say_bytes, say_count


@dataclass(slots=True, kw_only=True)
class Summary:
    """How a run went; filled in while it goes.

    Attributes:
        logical_batch: As it was stated, such as ``"512 rows"``.
        folder: Where the log and the report are.
        status: How it ended.
        updates: Updates that were applied.
        skipped: Windows that became no update.
        cut: Whether any logical batch was cut.
        rows_at_once: The most rows that one micro-batch held. Unit: rows.
        joined: Whether the graphs of all micro-batches were held until the backward pass.
        tokens_at_once: The most padded tokens that one micro-batch held, where rows have a length. Unit: tokens.
        measures: Of the last validation.
        evidence: What the comparison found; empty where there was none.
        seconds: From start to finish, the comparison included. Unit: seconds.
        report: The page, or None where it could not be written.
        rank: Which process says so; the first writes log and report.
        ranks: How many have trained together.
        why_no_report: Then a sentence that says why.
    """

    logical_batch: str
    folder: Path = Path()
    status: Literal["done", "interrupted", "failed"] = "failed"
    updates: int = 0
    skipped: int = 0
    cut: bool = False
    rows_at_once: int = 0
    joined: bool = False
    tokens_at_once: int | None = None
    measures: Mapping[str, float] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    report: Path | None = None
    rank: int = 0
    ranks: int = 1
    why_no_report: str | None = None

    @property
    def line(self) -> str:
        """What was achieved, in one line.

        Example:
            >>> summary = Summary(logical_batch="512 rows", status="done", updates=43)
            >>> summary.cut, summary.rows_at_once, summary.measures = True, 41, {"loss": 1.6, "bits_per_byte": 2.31}
            >>> summary.evidence = {"gradient_error": 1.1e-7, "gradient_ok": True, "speedup": 2.3}
            >>> for part in summary.line.split("; "):
            ...     print(part)
            43 updates of 512 rows, never more than 41 rows in memory at once
            validation bits per byte 2.31
            gradient equal to the undivided batch's to 1.1e-07
            2.3 times as fast as the plain loop.
        """
        parts = [self._updates(), self._validation(), *self._evidence()]
        line = "; ".join(part for part in parts if part)
        return (f"Interrupted after {line}" if self.status == "interrupted" else line) + "."

    def _updates(self) -> str:
        said = f"{say_count(self.updates, 'update')} of {self.logical_batch}"
        if self.skipped:
            said += f" ({self.skipped} skipped)"
        if not self.updates + self.skipped:
            return said
        if self.ranks > 1:
            said += f" on {self.ranks} ranks"
        if not self.cut:
            return f"{said}, each in memory as a whole" if self.ranks == 1 else f"{said}, each rank's share as a whole"
        at_once = say_count(self.rows_at_once, "row")
        if self.tokens_at_once is not None:
            at_once = f"{say_count(self.tokens_at_once, 'token')} ({at_once})"
        if self.joined:
            return f"{said}, never more than {at_once} run at once, with the activations of all held"
        return f"{said}, never more than {at_once} in memory at once"

    def _validation(self) -> str:
        beyond = [name for name in self.measures if name != "loss"] or list(self.measures)
        if not beyond or not math.isfinite(self.measures[beyond[0]]):
            return ""
        return f"validation {beyond[0].replace('_', ' ')} {self.measures[beyond[0]]:.3g}"

    def _evidence(self) -> list[str]:
        said = []
        error, speedup = number(self.evidence, "gradient_error"), number(self.evidence, "speedup")
        cut, whole = (number(self.evidence, f"{which}_peak_bytes") for which in ("cut", "undivided"))
        if error is not None:
            said.append(
                f"gradient equal to the undivided batch's to {error:.1e}"
                if self.evidence.get("gradient_ok")
                else f"gradient NOT that of the undivided batch: it is {error:.2g} away"
            )
        if cut and whole:
            said.append(f"peak memory {say_bytes(cut)} instead of {say_bytes(whole)}")
        if speedup is not None:
            factor = "" if 0.95 <= speedup <= 1.05 else f"{speedup:.2g} times "
            said.append(f"{factor}as fast as the plain loop")
        return said
