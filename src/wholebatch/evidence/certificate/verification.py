"""What was found by cutting a batch in three ways? The certificate, as text and as plain values."""

import math
from dataclasses import dataclass, replace
from typing import Any

from wholebatch.core.errors import VerifyError
from wholebatch.engine.checks.causes import Cause


@dataclass(frozen=True, slots=True)
class CutFound:
    """One way to cut the batch, and what came of it.

    Attributes:
        name: ``"by rows"``, ``"permuted"`` or ``"ragged"``.
        micro_batches: How many parts it has.
        ok: Whether the gradient is that of the undivided batch, up to rounding.
        error: 2-norm of the difference of the two gradients over that of the undivided one. Relative.
        updates: How often the user's own step stepped its optimizer; 1 where the accumulator ran.
        schedule_steps: How often it stepped its schedule.
        window: The window in which it was seen, from 1. While all is well, one is permuted and ragged at once.
    """

    name: str
    micro_batches: int
    ok: bool
    error: float
    updates: int = 1
    schedule_steps: int = 0
    window: int = 1

    def __str__(self) -> str:
        said = f"{self.name}, {self.micro_batches} micro-batches: off by {self.error:.1e}"
        if self.updates != 1:
            said += f", {self.updates} updates"
        if self.schedule_steps > 1:
            said += f", {self.schedule_steps} steps of the schedule"
        return said


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found: a certificate that the update is that of the undivided batch, or why it is not.

    Attributes:
        ok: Whether all cuts agree with the undivided batch up to rounding, and nothing else is wrong with the step.
        error: 2-norm of the difference of the two gradients over that of the undivided one, by rows. Relative.
        eps: The rounding unit that errors are compared with: ``torch.finfo(dtype).eps`` of the coarsest weights.
        tolerance: The largest error of a parameter that still counts as rounding. Unit: `eps`.
        by_parameter: The largest error of each parameter's gradient over the cuts. Unit: `eps`.
        causes: Why they differ, each with the line to change; empty when they agree.
        rows: Rows in the batch.
        micro_batches: How many parts it was cut into, by rows.
        cut_peak_bytes: Highest memory use with the batch cut, as in `Update.peak_bytes`: on a CPU of the whole process,
            with what earlier work has left behind. None where nothing tells.
        undivided_peak_bytes: The same with the batch as a whole. Unit: bytes.
        cuts: What came of each cut; where all is well, one window shows two of them.
        step: Where the user's own step is defined; None where the accumulator was verified.

    Example:
        >>> import torch, wholebatch as wb
        >>> def loss_fn(model, batch):
        ...     return model(batch).square().sum(), len(batch)
        >>> verification = wb.verify(torch.nn.Linear(3, 1), loss_fn, torch.ones(4, 3))
        >>> verification.ok, verification.cause, sorted(verification.by_parameter)
        (True, None, ['bias', 'weight'])
        >>> [cut.name for cut in verification.cuts]
        ['by rows', 'permuted', 'ragged']
    """

    ok: bool
    error: float
    eps: float
    tolerance: float
    by_parameter: dict[str, float]
    causes: tuple[Cause, ...]
    rows: int
    micro_batches: int
    cut_peak_bytes: int | None
    undivided_peak_bytes: int | None
    cuts: tuple[CutFound, ...] = ()
    step: str | None = None

    @property
    def cause(self) -> str | None:
        """The first cause, its name in front, or None where the gradients agree."""
        return f"{self.causes[0].name}: {self.causes[0].found}" if self.causes else None

    def __str__(self) -> str:
        whose = "gradient" if self.step is None else "update of the step"
        cut = f"the {whose} of {self.rows} rows as a whole and in {self.micro_batches} micro-batches differs"
        windows = {each.window: [found for found in self.cuts if found.window == each.window] for each in self.cuts}
        names = {window: " and ".join(each.name for each in found) for window, found in windows.items()}
        cuts = [f"  {replace(found[0], name=names[window])}" for window, found in windows.items()]
        if self.ok:
            return "\n".join([f"equal: {cut} by {self.error:.1e} (relative), which is rounding.", *cuts])
        lines = [f"not equal: {cut} by {self.error:.2g} (relative).", *cuts]
        for cause in self.causes:
            lines.append(f"cause: {cause.name}. {cause.found}")
            lines += [f"line: {cause.where}"] if cause.where is not None else []
            lines.append(f"hint: {cause.hint}")
        worst = sorted(self.by_parameter.items(), key=lambda item: -item[1])[:5]
        lines.append("worst parameters: " + ", ".join(f"{name} {error:.1e} eps" for name, error in worst))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, ready for JSON, where an error that is infinite or NaN is None."""
        return {
            "ok": self.ok,
            "error": _finite(self.error),
            "eps": self.eps,
            "tolerance": self.tolerance,
            "cause": self.cause,
            "causes": [
                {"name": each.name, "found": each.found, "hint": each.hint, "line": each.where} for each in self.causes
            ],
            "rows": self.rows,
            "micro_batches": self.micro_batches,
            "cuts": [
                {
                    "name": each.name,
                    "micro_batches": each.micro_batches,
                    "ok": each.ok,
                    "error": _finite(each.error),
                    "updates": each.updates,
                    "schedule_steps": each.schedule_steps,
                    "window": each.window,
                }
                for each in self.cuts
            ],
            "step": self.step,
            "cut_peak_bytes": self.cut_peak_bytes,
            "undivided_peak_bytes": self.undivided_peak_bytes,
            "by_parameter": {name: _finite(error) for name, error in self.by_parameter.items()},
        }

    def raise_if_not_ok(self) -> None:
        """Raise a `VerifyError` that says what is wrong, unless nothing is."""
        if not self.ok:
            raise VerifyError(
                str(self), hint="; ".join(cause.hint for cause in self.causes) or "look at the parameters."
            )


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None
