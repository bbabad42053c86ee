"""Is the update of a batch that was cut that of the whole batch, and if not, why, and which line is to be changed?"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from wholebatch.core.batch import Layout, LogicalBatch, paths
from wholebatch.core.errors import ConfigError, OptimizerError, SplitError
from wholebatch.core.split import Rows, Tokens
from wholebatch.core.weights import Reduction
from wholebatch.engine.checks.causes import Cause, diagnose
from wholebatch.engine.checks.distance import is_rounding
from wholebatch.engine.checks.flat import take_gradients
from wholebatch.engine.checks.pieces import Probe
from wholebatch.engine.device import input_device
from wholebatch.engine.objective import LossFn, Objective, TargetsFn
from wholebatch.engine.ranks.wrapping import by_itself
from wholebatch.engine.transaction import Transaction
from wholebatch.engine.versions import Versions
from wholebatch.evidence.certificate.blame import blame
from wholebatch.evidence.certificate.cuts import Cut, three_cuts
from wholebatch.evidence.certificate.examination import examine
from wholebatch.evidence.certificate.gradients import Accumulated, nothing, require_finite, undivided
from wholebatch.evidence.certificate.judge import Judge
from wholebatch.evidence.certificate.rehearsal import StepFn
from wholebatch.evidence.certificate.source import definition
from wholebatch.evidence.certificate.verification import CutFound, Verification

__all__ = ["Verification", "verify"]


@by_itself
def verify(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    step: StepFn | None = None,
    targets: TargetsFn | None = None,
    reduction: Reduction = "mean",
    micro_batch: Rows | Tokens | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    whole: Iterable[str] = (),
    dims: int | Mapping[str, int] | None = None,
) -> Verification:
    """Compare the update of a batch cut into micro-batches with that of the same batch as a whole.

    The batch is cut in three ways: by rows, permuted, and ragged. Without `step`, the accumulator runs each cut. With
    it, your own loop does, from a list of micro-batches to an update, so that the loop you have can be verified as it
    stands. On the way, a window runs out of memory on purpose, to see what a retry does, and has gradients that are
    2**20 times as large, so that a clip acts.

    The judge is the plain loop of `wholebatch.evidence.reference`, which shares no code with the accumulator and sees
    the whole batch, so it must fit into memory: take a small one. Model, gradients, buffers and random state are left
    as they were. What a step changes elsewhere, such as a moving average of its own, is not undone, nor are weights
    that the loss itself moves, such as those of an encoder that follows another.

    When all is well, the batch is run three times: once undivided, once by rows, and once ragged and permuted at once.
    A step runs a micro-batch more, until the lack of memory. What differs is run some more, each cut for itself, to
    find out why.

    Args:
        model: The module, in the mode in which it trains.
        loss_fn: As for `wb.Accumulator`, and so are the others, except `step`.
        batch: A logical batch of two rows or more.
        step: ``step(model, optimizer, micro_batches)``: your own window, from the first backward pass to
            ``optimizer.step()``. It is given plain SGD, a list, and weights without gradients: whether it clears
            them, or the loop around it does, is not looked at. An argument with ``sched`` in its name is given a
            schedule; one that the step brings along is not stepped, but counted.
        targets: Counts what the loss averages over. Default: rows.
        reduction: What `loss_fn` returns.
        micro_batch: How to cut; default: three parts, the last one smaller where the rows allow.
        collate: Turns a list of rows into a micro-batch.
        whole: Paths of tensors that each micro-batch gets as a whole.
        dims: The dimension on which rows lie.

    Returns:
        The certificate: the errors by cut, and by parameter in units of eps, and the causes where the updates differ,
        each with the line to change. Of model and loss: ``"batch norm"``, ``"dropout"``, ``"randomness"``, ``"carried
        over"``, ``"spectral norm"``, ``"reduction"``, ``"targets"``, ``"balancing loss"``, ``"not a sum over rows"``.
        Of a step:
        ``"mean of means"``, ``"ragged last window"``, ``"temperature counted k times"``, ``"balancing loss"``,
        ``"optimizer stepped per micro-batch"``, ``"scheduler per micro-batch"``, ``"retry on partial gradients"``,
        ``"stagnating bf16 sums"``, ``"clipping before the sum"``, ``"dropped micro-batches"``, ``"not divided"``,
        ``"wrong divisor"``, ``"weights"``, ``"no update"``.

    Raises:
        SplitError: The batch has fewer than two rows, or its parts disagree on how many rows there are.
        WeightError: The batch holds no target.
        NonFiniteError: Loss or gradient of the batch is infinite or not a number.
        OptimizerError: The model is no module, or nothing in it learns.
        ConfigError: The step cannot be called with what it gets, or an argument is not one of those above.
        Exception: What loss function or step raised, as it is.

    Example:
        >>> import torch
        >>> def loss_fn(model, batch):
        ...     return torch.nn.functional.mse_loss(model(batch["x"]), batch["y"])
        >>> batch = {"x": torch.arange(12.0).reshape(4, 3), "y": torch.zeros(4, 1)}
        >>> verify(torch.nn.Linear(3, 1), loss_fn, batch).ok
        True
        >>> verify(torch.nn.Linear(3, 1), loss_fn, batch, reduction="sum").causes[0].name
        'reduction'
        >>> def my_window(model, optimizer, micro_batches):
        ...     optimizer.zero_grad()
        ...     for micro_batch in micro_batches:
        ...         loss = loss_fn(model, micro_batch) / len(micro_batches)
        ...         loss.backward()
        ...     optimizer.step()
        >>> certificate = verify(torch.nn.Linear(3, 1), loss_fn, batch, step=my_window)
        >>> certificate.ok, certificate.causes[0].name
        (False, 'mean of means')
        >>> certificate.causes[0].where.rpartition(": ")[2]
        'loss = loss_fn(model, micro_batch) / len(micro_batches)'
    """
    if not isinstance(model, nn.Module):
        raise OptimizerError(
            f"The model is a {type(model).__name__}, not a torch.nn.Module.",
            hint="pass the module first: wb.verify(model, loss_fn, batch).",
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise OptimizerError(
            "None of the model's parameters requires a gradient, so that there is none to compare.",
            hint="unfreeze what is to learn: parameter.requires_grad_(True).",
        )
    if micro_batch is not None and not isinstance(micro_batch, Rows | Tokens):
        raise ConfigError(
            f"micro_batch={micro_batch!r} says nothing about which rows go together.",
            hint="pass wb.Rows(8) or wb.Tokens(4096, length=...), or leave it out.",
        )
    if step is not None and not callable(step):
        raise ConfigError(
            f"step is a {type(step).__name__}, which cannot be called.",
            hint="pass your own window: step(model, optimizer, micro_batches), or leave it out.",
        )
    whole = paths(whole)
    rows = Layout(collate, whole, dims).logical(batch)
    if rows.rows < 2:
        raise SplitError("A batch of one row cannot be cut.", hint="verify with two rows or more.")
    micro_batch = micro_batch if micro_batch is not None else Rows(-(-rows.rows // 3))
    cuts = three_cuts(rows, micro_batch)
    objective = Objective(loss_fn, targets, reduction)
    probe = Probe(model, objective, rows)
    transaction = Transaction(model, input_device(model))
    versions = Versions(batch) if collate is None else None
    found = [(parameter, parameter.grad) for parameter in model.parameters()]
    transaction.begin()
    cut_peak: int | None = None
    doubtful = step is not None  # whether the batch has to be looked at: is it finite as a whole?
    try:
        if step is None:
            # Not the random state: other draws show what depends on them.
            form = {"micro_batch": micro_batch, "collate": collate, "whole": whole, "dims": dims}
            accumulated = Accumulated(model, probe.parameters, objective, transaction.roll_back_buffers, **form)
            update, by_rows = accumulated.step(batch)
            cut_peak = update.peak_bytes if update is not None else None
            doubtful = update is None
        elif not _has_targets(objective, rows):
            raise nothing()
        peak, loss = undivided(model, objective, rows)
        right = take_gradients(probe.parameters)
        if doubtful:
            require_finite(loss, right)
        judge = Judge(probe, right, cuts[0].parts)
        transaction.roll_back_buffers()
        if step is None:
            ok, causes, cuts_found, errors = _judge(judge, accumulated, rows, cuts, by_rows, transaction.roll_back)
        else:
            ok, causes, cuts_found, errors = _judge_step(step, judge, rows, cuts, transaction.roll_back_buffers)
        if not ok and versions is not None:
            versions.require()
        causes = blame(causes, model, loss_fn, targets=targets, step=step)
        by_parameter = [max(each) for each in zip(*errors, strict=True)]
    finally:
        transaction.roll_back()
        for parameter, grad in found:
            parameter.grad = grad
    eps = probe.eps
    return Verification(
        ok=ok,
        error=cuts_found[0].error,
        eps=eps,
        tolerance=probe.tolerance / eps,
        by_parameter={name: error / eps for name, error in zip(probe.names, by_parameter, strict=True)},
        causes=tuple(causes),
        rows=rows.rows,
        micro_batches=cuts_found[0].micro_batches,
        cut_peak_bytes=cut_peak,
        undivided_peak_bytes=peak,
        cuts=tuple(cuts_found),
        step=str(definition(step)) if step is not None else None,
    )


def _judge(
    judge: Judge,
    accumulated: Accumulated,
    rows: LogicalBatch,
    cuts: Sequence[Cut],
    by_rows: list[Tensor],
    roll_back: Callable[[], None],
) -> tuple[bool, list[Cause], list[CutFound], list[list[float]]]:
    """Judge what the accumulator makes of the cuts; the first one that is off is looked at for the cause."""
    _, permuted, ragged = cuts
    probe, everything = judge.probe, range(rows.rows)
    windows = [(1, cuts[0], by_rows), (2, ragged, accumulated.window(rows, ragged))]

    def right() -> bool:
        return all(judge.right(gradient) for _, _, gradient in windows)

    def coarsened() -> bool:  # such as autocast in the loss
        roll_back()
        return probe.coarsen(lambda: probe.run(everything))

    if right() or (coarsened() and right()):
        windows.insert(1, windows[1])  # it is permuted as well
    else:
        windows[1:] = [(2, permuted, accumulated.window(rows, permuted)), (3, *windows[1][1:])]
    errors = [judge.errors(gradient) for _, _, gradient in windows]
    found = [
        CutFound(cut.name, len(run.parts), is_rounding(each, probe.tolerance), judge.off(gradient), window=window)
        for cut, (window, run, gradient), each in zip(cuts, windows, errors, strict=True)
    ]
    off = next((cut for cut, each in zip(cuts, found, strict=True) if not each.ok), None)
    causes = diagnose(probe, everything, off.parts) if off is not None else []
    return off is None, causes, found, errors


def _judge_step(
    step: StepFn, judge: Judge, rows: LogicalBatch, cuts: Sequence[Cut], roll_back: Callable[[], None]
) -> tuple[bool, list[Cause], list[CutFound], list[list[float]]]:
    """Judge what the user's own step made of the cuts."""
    trial, causes = examine(step, judge, rows, cuts, roll_back)
    windows = list({id(run): run for run in trial.runs}.values())
    found = [
        CutFound(
            cut.name,
            len(run.cut.parts),
            trial.ok
            or (
                (judge.right(run.gradient) or run.clipped is not None)
                and len(run.found.steps) == 1
                and run.found.schedule_steps <= 1
            ),
            run.error(judge),
            len(run.found.steps),
            run.found.schedule_steps,
            next(number for number, window in enumerate(windows, 1) if window is run),
        )
        for cut, run in zip(cuts, trial.runs, strict=True)
    ]
    return trial.ok, causes, found, [run.errors(judge) for run in trial.runs]


def _has_targets(objective: Objective, rows: LogicalBatch) -> bool:
    everything = range(rows.rows)
    return float(objective.count(rows.take(everything), rows.rows)) > 0
