"""Is the update of a batch that was cut that of the whole batch, and if not, why, and which line is to be changed?"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wholebatch.core.batch import Layout, LogicalBatch, paths
from wholebatch.core.errors import ConfigError, NonFiniteError, OptimizerError, SplitError, WeightError
from wholebatch.core.record import Update
from wholebatch.core.split import Rows, Tokens
from wholebatch.core.weights import Reduction
from wholebatch.engine import memory
from wholebatch.engine.accumulator import Accumulator
from wholebatch.engine.batchnorm import batch_dependent_layers
from wholebatch.engine.checks.causes import Cause, diagnose
from wholebatch.engine.checks.pieces import Probe, flat_gradient
from wholebatch.engine.device import input_device, move
from wholebatch.engine.objective import LossFn, Objective, TargetsFn
from wholebatch.engine.ranks.wrapping import by_itself
from wholebatch.engine.transaction import Transaction
from wholebatch.evidence import reference
from wholebatch.evidence.certificate.blame import blame
from wholebatch.evidence.certificate.cuts import Cut, three_cuts
from wholebatch.evidence.certificate.examination import examine
from wholebatch.evidence.certificate.judge import Judge
from wholebatch.evidence.certificate.rehearsal import StepFn
from wholebatch.evidence.certificate.source import definition
from wholebatch.evidence.certificate.verification import CutFound, Verification

__all__ = ["Catch", "Verification", "verify"]


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
    stands. On the way, one window runs out of memory on purpose, to see what a retry does, and another has gradients
    that are 2**20 times as large, so that a clip acts.

    The judge is the plain loop of `wholebatch.evidence.reference`, which shares no code with the accumulator and sees
    the whole batch, so it must fit into memory: take a small one. Model, gradients, buffers and random state are left
    as they were. What a step changes elsewhere, such as a moving average of its own, is not undone.

    When all is well, the batch is run four times: once undivided, and once for each cut. A step runs half a window
    more, until the lack of memory, and one that is wrong some more, to find out why. Where a pass takes tens of
    milliseconds this costs four to six undivided ones; there are some 5 ms beside, and the time to compare gradients.

    Args:
        model: The module, in the mode in which it trains.
        loss_fn: As for `wb.Accumulator`, and so are the others, except `step`.
        batch: A logical batch of two rows or more.
        step: ``step(model, optimizer, micro_batches)``: your own window, from the first backward pass to
            ``optimizer.step()``. It is given plain SGD, and a list. An argument with ``sched`` in its name is given a
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
        OptimizerError: The model is no module.
        ConfigError: The step cannot be called with what it gets, or an argument is not one of those above.
        Exception: What loss function or step raised, as it is.

    Example:
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
    device = input_device(model)
    transaction = Transaction(model, device)
    found = [parameter.grad for parameter in model.parameters()]
    transaction.begin()
    cut_peak: int | None = None
    try:
        gradients: list[Tensor] = []
        roll_back = transaction.roll_back_buffers  # not the random state: other draws show what depends on them
        if step is None:
            memory.release(device)
            form = {"micro_batch": micro_batch, "collate": collate, "whole": whole, "dims": dims}
            update, gradients = _cut_gradients(model, batch, rows, objective, cuts, roll_back, **form)
            cut_peak = update.peak_bytes
            roll_back()
        elif not _has_targets(objective, rows):
            raise _nothing()
        peak, whole_gradient = _whole_gradient(model, objective, rows)
        roll_back()
        judge = Judge(probe, whole_gradient, cuts[0].parts)
        if step is None:
            transaction.roll_back()
            ok, causes, cuts_found = _judge(judge, cuts, gradients, rows.rows)
            errors = [judge.errors(gradient) for gradient in gradients]
        else:
            ok, causes, cuts_found, errors = _judge_step(step, judge, rows, cuts)
        causes = blame(causes, model, loss_fn, targets=targets, step=step)
        by_parameter = [max(each) for each in zip(*errors, strict=True)]
    finally:
        transaction.roll_back()
        for parameter, grad in zip(model.parameters(), found, strict=True):
            parameter.grad = grad
    return Verification(
        ok=ok,
        error=cuts_found[0].error,
        eps=probe.eps,
        tolerance=probe.tolerance / probe.eps,
        by_parameter={name: error / probe.eps for name, error in zip(probe.names, by_parameter, strict=True)},
        causes=tuple(causes),
        rows=rows.rows,
        micro_batches=cuts_found[0].micro_batches,
        cut_peak_bytes=cut_peak,
        undivided_peak_bytes=peak,
        cuts=tuple(cuts_found),
        step=str(definition(step)) if step is not None else None,
    )


class Catch(torch.optim.Optimizer):
    """Keeps the gradient that it is given to step with, and moves nothing."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.gradient = torch.zeros(0, dtype=torch.float64)

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        self.gradient = flat_gradient(parameter for group in self.param_groups for parameter in group["params"])


def _judge(
    judge: Judge, cuts: Sequence[Cut], gradients: Sequence[Tensor], num_rows: int
) -> tuple[bool, list[Cause], list[CutFound]]:
    """Judge what the accumulator made of the cuts; the first one that is off is looked at for the cause."""
    if not all(map(judge.right, gradients)):
        judge.probe.coarsen(lambda: judge.probe.run(range(num_rows)))  # such as autocast in the loss
    found = [
        CutFound(cut.name, len(cut.parts), judge.right(gradient), judge.off(gradient))
        for cut, gradient in zip(cuts, gradients, strict=True)
    ]
    off = next((cut for cut, each in zip(cuts, found, strict=True) if not each.ok), None)
    causes = diagnose(judge.probe, range(num_rows), off.parts) if off is not None else []
    return off is None, causes, found


def _judge_step(
    step: StepFn, judge: Judge, rows: LogicalBatch, cuts: Sequence[Cut]
) -> tuple[bool, list[Cause], list[CutFound], list[list[float]]]:
    """Judge what the user's own step made of the cuts."""
    trial, causes = examine(step, judge.probe, rows, cuts, judge.whole)
    found = [
        CutFound(
            run.cut.name,
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
        )
        for run in trial.runs
    ]
    return trial.ok, causes, found, [run.errors(judge) for run in trial.runs]


def _cut_gradients(
    model: nn.Module,
    batch: Any,
    rows: LogicalBatch,
    objective: Objective,
    cuts: Sequence[Cut],
    roll_back: Callable[[], None],
    **cut: Any,
) -> tuple[Update, list[Tensor]]:
    """Run the accumulator on each cut and catch the gradients that it steps with: first `step`, then `window`."""
    catch = Catch(parameter for parameter in model.parameters() if parameter.requires_grad)
    accumulator = Accumulator(
        model,
        catch,
        objective.loss_fn,
        targets=objective.targets,
        reduction=objective.reduction,
        batch_norm="per_micro_batch",
        check=None,
        on_nonfinite="raise",
        **cut,
    )
    update = accumulator.step(batch)
    if update.skipped is not None:
        raise _nothing(update.skipped)
    gradients = [catch.gradient]
    for other in cuts[1:]:
        roll_back()
        try:
            if accumulator.meets:
                accumulator.make(rows, other.parts)
            else:
                _run_window(accumulator, model, objective, rows, other)
            gradients.append(catch.gradient)
        except Exception as error:
            # By rows it was finite, and no layer refused; then this is a difference.
            if not isinstance(error, NonFiniteError) and not batch_dependent_layers(model):
                raise
            gradients.append(torch.full_like(catch.gradient, float("nan")))
    return update, gradients


def _run_window(accumulator: Accumulator, model: nn.Module, objective: Objective, rows: LogicalBatch, cut: Cut) -> None:
    device = input_device(model)
    with accumulator.window(micro_batches=len(cut.parts)) as window:
        for part in cut.parts:
            micro_batch = move(rows.take(part), device)
            count = objective.count(micro_batch, len(part))
            added = None if not isinstance(count, Tensor) and count == 0 else objective(model, micro_batch, count)
            if added is None:
                window.leave_out(rows=len(part))
            else:
                window.add(added, rows=len(part))


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


def _has_targets(objective: Objective, rows: LogicalBatch) -> bool:
    everything = range(rows.rows)
    return float(objective.count(rows.take(everything), rows.rows)) > 0


def _nothing(why: str = "no micro-batch held a target") -> WeightError:
    return WeightError(f"There is nothing to compare: {why}.", hint="verify with a batch that holds targets.")
