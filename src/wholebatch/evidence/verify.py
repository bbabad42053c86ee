"""The user's model, cut and uncut: is the gradient of the cut batch that of the whole one, and if not, why?"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wholebatch.core.errors import SplitError, VerifyError, WeightError
from wholebatch.core.record import Update
from wholebatch.core.split import LogicalBatch, Rows, Tokens
from wholebatch.core.weights import Reduction
from wholebatch.engine import memory
from wholebatch.engine.accumulator import Accumulator
from wholebatch.engine.causes import Cause, diagnose
from wholebatch.engine.device import input_device, move
from wholebatch.engine.objective import LossFn, Objective, TargetsFn
from wholebatch.engine.pieces import Probe, errors, flat_gradient, is_rounding, scale_of_parts
from wholebatch.engine.transaction import Transaction
from wholebatch.evidence import reference


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found.

    Attributes:
        ok: Whether the gradients agree up to rounding.
        error: 2-norm of the difference of the two gradients over that of the undivided one. Relative.
        eps: The rounding unit that errors are compared with: ``torch.finfo(dtype).eps`` of the coarsest weights.
        tolerance: The largest error of a parameter that still counts as rounding. Unit: `eps`.
        by_parameter: The error of each parameter's gradient. Unit: `eps`.
        causes: Why they differ; empty when they agree.
        rows: Rows in the batch.
        micro_batches: How many parts it was cut into.
        cut_peak_bytes: Highest memory use with the batch cut, as in `Update.peak_bytes`; None where nothing tells.
        undivided_peak_bytes: The same with the batch as a whole. Unit: bytes.

    Example:
        >>> def loss_fn(model, batch):
        ...     return model(batch).square().sum(), len(batch)
        >>> verification = verify(nn.Linear(3, 1), loss_fn, torch.ones(4, 3))
        >>> verification.ok, verification.cause, sorted(verification.by_parameter)
        (True, None, ['bias', 'weight'])
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

    @property
    def cause(self) -> str | None:
        """The first cause, its name in front, or None where the gradients agree."""
        return f"{self.causes[0].name}: {self.causes[0].found}" if self.causes else None

    def __str__(self) -> str:
        cut = f"{self.rows} rows as a whole and in {self.micro_batches} micro-batches"
        if self.ok:
            return f"equal: the gradient of {cut} differs by {self.error:.1e} (relative), which is rounding."
        lines = [f"not equal: the gradient of {cut} differs by {self.error:.2g} (relative)."]
        lines += [f"cause: {cause.name}. {cause.found}\nhint: {cause.hint}" for cause in self.causes]
        worst = sorted(self.by_parameter.items(), key=lambda item: -item[1])[:5]
        lines.append("worst parameters: " + ", ".join(f"{name} {error:.1e} eps" for name, error in worst))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, ready for JSON."""
        return {
            "ok": self.ok,
            "error": self.error,
            "eps": self.eps,
            "tolerance": self.tolerance,
            "cause": self.cause,
            "causes": [{"name": each.name, "found": each.found, "hint": each.hint} for each in self.causes],
            "rows": self.rows,
            "micro_batches": self.micro_batches,
            "cut_peak_bytes": self.cut_peak_bytes,
            "undivided_peak_bytes": self.undivided_peak_bytes,
            "by_parameter": self.by_parameter,
        }

    def raise_if_not_ok(self) -> None:
        """Raise a `VerifyError` that says what is wrong, unless nothing is."""
        if not self.ok:
            raise VerifyError(
                str(self), hint="; ".join(cause.hint for cause in self.causes) or "look at the parameters."
            )


def verify(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    targets: TargetsFn | None = None,
    reduction: Reduction = "mean",
    micro_batch: Rows | Tokens | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    whole: Iterable[str] = (),
    dims: int | Mapping[str, int] | None = None,
) -> Verification:
    """Compare the gradient of a batch cut into micro-batches with that of the same batch as a whole.

    The whole batch goes through the plain loop of `wholebatch.evidence.reference`, which shares no code with the
    accumulator, so it must fit into memory: take a small one. Model, gradients, buffers and random state are left as
    they were.

    Args:
        model: The module, in the mode in which it trains.
        loss_fn: As for `wb.Accumulator`, and so are the following.
        batch: A logical batch of two rows or more.
        targets: Counts what the loss averages over. Default: rows.
        reduction: What `loss_fn` returns.
        micro_batch: How to cut; default: three parts, the last one smaller where the rows allow.
        collate: Turns a list of rows into a micro-batch.
        whole: Paths of tensors that each micro-batch gets as a whole.
        dims: The dimension on which rows lie.

    Returns:
        The error by parameter in units of eps, and the causes where the gradients differ: batch norm, dropout, a wrong
        reduction, wrong targets, or a loss that is not a sum over rows.

    Raises:
        SplitError: The batch has fewer than two rows, or its parts disagree on how many rows there are.
        WeightError: The batch holds no target.
        NonFiniteError: Loss or gradient of the batch is infinite or not a number.

    Example:
        >>> def loss_fn(model, batch):
        ...     return torch.nn.functional.mse_loss(model(batch["x"]), batch["y"])
        >>> batch = {"x": torch.ones(4, 3), "y": torch.zeros(4, 1)}
        >>> verify(torch.nn.Linear(3, 1), loss_fn, batch).ok
        True
        >>> verify(torch.nn.Linear(3, 1), loss_fn, batch, reduction="sum").causes[0].name
        'reduction'
    """
    rows = LogicalBatch(batch, collate=collate, whole=whole, dims=dims)
    if rows.rows < 2:
        raise SplitError("A batch of one row cannot be cut.", hint="verify with two rows or more.")
    cut = micro_batch if micro_batch is not None else Rows(-(-rows.rows // 3))
    objective = Objective(loss_fn, targets, reduction)
    probe = Probe(model, objective, rows)
    transaction = Transaction(model, input_device(model))
    found = [parameter.grad for parameter in model.parameters()]
    transaction.begin()
    memory.release(input_device(model))
    try:
        update, cut_gradient = _cut_gradient(
            model,
            loss_fn,
            batch,
            micro_batch=cut,
            targets=targets,
            reduction=reduction,
            collate=collate,
            whole=whole,
            dims=dims,
        )
        if update.skipped is not None:
            raise WeightError(
                f"There is nothing to compare: {update.skipped}.", hint="verify with a batch that holds targets."
            )
        transaction.roll_back_buffers()  # not the random state: other draws show what depends on them
        peak, whole_gradient = _whole_gradient(model, objective, rows)
        transaction.roll_back()
        difference = errors(cut_gradient, whole_gradient, whole_gradient.abs(), probe.sizes)
        causes: list[Cause] = []
        if not is_rounding(difference, probe.tolerance):  # measured again by what the parts hold before they cancel
            parts = cut.cut(rows.lengths(cut.length)) if isinstance(cut, Tokens) else cut.cut(rows.rows)
            difference = errors(cut_gradient, whole_gradient, scale_of_parts(probe, parts), probe.sizes)
        if not is_rounding(difference, probe.tolerance):
            causes = diagnose(probe, range(rows.rows), parts)
    finally:
        transaction.roll_back()
        for parameter, grad in zip(model.parameters(), found, strict=True):
            parameter.grad = grad
    size = float(whole_gradient.norm())
    return Verification(
        ok=is_rounding(difference, probe.tolerance),
        error=float((cut_gradient - whole_gradient).norm()) / size if size > 0 else 0.0,
        eps=probe.eps,
        tolerance=probe.tolerance / probe.eps,
        by_parameter={name: error / probe.eps for name, error in zip(probe.names, difference, strict=True)},
        causes=tuple(causes),
        rows=rows.rows,
        micro_batches=update.micro_batches,
        cut_peak_bytes=update.peak_bytes,
        undivided_peak_bytes=peak,
    )


class Catch(torch.optim.Optimizer):
    """Keeps the gradient that it is given to step with, and moves nothing."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.gradient = torch.zeros(0, dtype=torch.float64)

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        self.gradient = flat_gradient(parameter for group in self.param_groups for parameter in group["params"])


def _cut_gradient(model: nn.Module, loss_fn: LossFn, batch: Any, **cut: Any) -> tuple[Update, Tensor]:
    catch = Catch(parameter for parameter in model.parameters() if parameter.requires_grad)
    accumulator = Accumulator(
        model, catch, loss_fn, batch_norm="per_micro_batch", check=None, on_nonfinite="raise", **cut
    )
    return accumulator.step(batch), catch.gradient


def _whole_gradient(model: nn.Module, objective: Objective, rows: LogicalBatch) -> tuple[int | None, Tensor]:
    device = input_device(model)
    memory.release(device)
    memory.reset_peak(device)
    reference.gradient(  # type: ignore[no-untyped-call]
        model,
        objective.loss_fn,
        move(rows.take(range(rows.rows)), device),
        targets=objective.targets or (lambda _batch: rows.rows),
        reduction=objective.reduction,
    )
    peak = memory.peak_bytes(device)
    return peak, flat_gradient(parameter for parameter in model.parameters() if parameter.requires_grad)
