"""Will it fit, and how? From a model and a few rows to a plan."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from wholebatch.core.batch import Layout, paths
from wholebatch.core.budget import parse_bytes, say_bytes
from wholebatch.core.errors import ConfigError, LossError, SplitError
from wholebatch.core.plan import Plan
from wholebatch.core.planner import Planner, Task
from wholebatch.core.split import Rows, Tokens
from wholebatch.core.spread import Spread
from wholebatch.core.ways import Ladder, Way
from wholebatch.core.weights import Reduction
from wholebatch.engine.batchnorm import batch_dependent_layers
from wholebatch.engine.fit.applying import apply
from wholebatch.engine.fit.checkpointing import recomputing
from wholebatch.engine.fit.offloading import offloading
from wholebatch.engine.fit.probe import Probe
from wholebatch.engine.fit.rowsize import largest_row
from wholebatch.engine.fit.sample import Sample
from wholebatch.engine.fit.timing import clock
from wholebatch.engine.fit.ways import Ways
from wholebatch.engine.meetings.exactnorm import exact_layers
from wholebatch.engine.narrow import SumIn, check_sum_in
from wholebatch.engine.objective import LossFn, Objective, TargetsFn
from wholebatch.engine.precision import Format, Precision
from wholebatch.engine.ranks.wrapping import by_itself
from wholebatch.engine.setup import Setup
from wholebatch.engine.steps.consuming import takers

PATIENCE = 20.0
"""No pass is timed that would take longer. Unit: seconds."""


@by_itself
def plan(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    loss_fn: LossFn,
    rows: Any,
    logical_batch: int | None = None,
    memory: str | int | None = None,
    *,
    targets: TargetsFn | None = None,
    reduction: Reduction = "mean",
    micro_batch: Any = "auto",
    collate: Callable[[list[Any]], Any] | None = None,
    whole: Iterable[str] = (),
    dims: int | Mapping[str, int] | None = None,
    length: Callable[[Any], int] | None = None,
    precision: Format = "fp32",
    accumulate_in: SumIn | None = None,
    timed: bool = True,
    ranks: int = 1,
    bandwidth: str | float | None = None,
    latency: str | float = 0.0,
) -> Plan:
    """Say before training whether it fits into memory, how the logical batch is best cut, and why.

    The model runs on fake tensors, which have shapes and take neither memory nor time, and on a few real rows for what
    those cannot show; then some sizes are timed. Nothing is trained: weights, gradients, buffers, random state and
    optimizer are left as they were. A batch that fits is not cut; 16 bits are proposed and never chosen; activations
    are recomputed only if a single row would not fit or if larger micro-batches win more than that costs, in as few
    blocks as will do (`Plan.apply`); and of the micro-batches that fit the smallest is taken that is within 2 % of the
    fastest.

    Args:
        model: The module that is to be trained, on the device where it will be.
        optimizer: As for `wb.Accumulator`.
        loss_fn: The same.
        rows: A sample like the rows of training: a list of rows with `collate`, or a pytree of tensors. Where lengths
            vary it should hold the longest there is.
        logical_batch: Rows of a logical batch; None: as many as the sample holds. Unit: rows.
        memory: What there is, such as ``"8GiB"``, or a number of bytes; None: what the device has free.
        targets: As for `wb.Accumulator`.
        reduction: The same.
        micro_batch: ``"auto"``, or `wb.Rows` or `wb.Tokens` whose need is wanted.
        collate: As for `wb.Accumulator`.
        whole: The same.
        dims: The same.
        length: Says how long a row is, as for `wb.Tokens`; then the micro-batch is planned in tokens.
        precision: As for `wb.Accumulator`.
        accumulate_in: The same.
        timed: Whether passes are timed, which takes less than two windows.
        ranks: On how many ranks like this one the logical batch will be trained. The plan is that of each.
        bandwidth: What a rank sends to another in a second, such as ``"25GB/s"`` or ``"100Gbit/s"``, or a number of
            bytes; with it the plan predicts the time of a window on all ranks.
        latency: How long an empty message takes from rank to rank, such as ``"20us"``, or a number of seconds.

    Returns:
        The plan; ``print`` shows it.

    Raises:
        ConfigError: `memory` is no size, `logical_batch` no number of rows, `ranks` no number of ranks, or a bandwidth
            or latency is none.
        OptimizerError, WeightError, LossError, SplitError: As for `wb.Accumulator`.

    Example:
        >>> import torch
        >>> import wholebatch as wb
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
        >>> plan = wb.plan(
        ...     model,
        ...     torch.optim.AdamW(model.parameters()),
        ...     lambda model, x: torch.nn.functional.mse_loss(model(x), x),
        ...     torch.randn(8, 64),
        ...     logical_batch=4096,
        ...     memory="2MB",
        ...     timed=False,
        ... )
        >>> plan.fits, plan.micro_batches > 1, plan.peak_bytes < 2_000_000
        (True, True, True)
    """
    if isinstance(micro_batch, Tokens) and length is None:
        length = micro_batch.length
    if length is not None:
        Tokens(1, length=length)  # says what is wrong with it
    layout = Layout(collate, paths(whole), dims)
    budget = parse_bytes(memory) if memory is not None else None
    sample = Sample(rows, layout.collate, layout.whole, layout.dims, copied=length is not None)
    count = sample.rows.rows
    if count == 0:
        raise SplitError("The sample holds no rows.", hint="pass a few rows like those that will be trained on.")
    if not _is_number_of_rows(logical_batch):
        raise ConfigError(f"logical_batch={logical_batch!r} is no number of rows.", hint="pass 1 or more, such as 512.")
    spread = Spread.of(logical_batch or count, ranks, bandwidth, latency)
    if not callable(loss_fn):
        raise LossError(
            f"The loss function is a {type(loss_fn).__name__}.", hint="pass the one that will be trained on."
        )
    setup = Setup.of(model, optimizer, None)
    job = Probe(
        setup,
        Objective(loss_fn, targets, reduction),
        Precision(precision, setup.device),
        check_sum_in(accumulate_in),
        sample,
    )
    made = Planning(job, spread.rows_each, budget, length, precision, shared=ranks > 1).plan(micro_batch, timed=timed)
    return spread(made)


def _is_number_of_rows(said: object) -> bool:
    return said is None or (isinstance(said, int) and not isinstance(said, bool) and said >= 1)


class Planning:
    """One plan in the making.

    Args:
        probe: Looks at what the job takes.
        rows: Of a logical batch.
        budget: What there is; None: what the device has free. Unit: bytes.
        length: Says how long a row is, or None.
        precision: In which forward passes run.
        shared: Whether these are the rows of one rank among several.
    """

    def __init__(
        self,
        probe: Probe,
        rows: int,
        budget: int | None,
        length: Callable[[Any], int] | None,
        precision: Format,
        *,
        shared: bool = False,
    ) -> None:
        self._probe = probe
        self._shared = shared
        self._rows = rows
        self._budget = budget
        self._length = length
        self._precision = precision
        self._lengths: list[int] | None = None
        sample = probe.sample.rows
        if length is not None:
            self._lengths = sample.lengths(length)
            by_length = sorted(range(sample.rows), key=self._lengths.__getitem__)
            three = [by_length[0], by_length[len(by_length) // 2], by_length[-1]]
            self._rows_of = {self._lengths[row]: row for row in three}
        else:
            self._rows_of = {0: largest_row(probe.sample)}

    def plan(self, micro_batch: Any, *, timed: bool) -> Plan:
        """Measure, choose and return the plan."""
        probe = self._probe
        ways = Ways(probe, self._rows, self._rows_of, self._budget)
        plain = ways.plain()
        task = Task(
            self._rows,
            ways.budget,
            self._all_lengths(),
            self._length,
            self._precision,
            folds=bool(takers(probe.setup.optimizers)),
            shared=self._shared,
        )
        others = [ways.narrower(), ways.recomputing(len(ways.names))]
        planner = Planner(
            task,
            [plain, *(each for each in others if each is not None)],
            self._clock if timed else None,
            tuple(probe.reasons),
            Ladder(len(ways.names), ways.recomputing, ways.fully, ways.guess),
            ways.offloaded,
        )
        if micro_batch == "auto":
            return self._finished(self._joined(planner.plan(), planner))
        if not isinstance(micro_batch, Rows | Tokens):
            raise ConfigError(
                f"micro_batch={micro_batch!r} says nothing about which rows go together.",
                hint='pass wb.Rows(8), wb.Tokens(4096, length=...) or "auto".',
            )
        return self._finished(self._joined(planner.stated(micro_batch), planner))

    def _joined(self, made: Plan, planner: Planner) -> Plan:
        """Plan all rows at once where batch norm is exact, since graphs that are joined take as much however cut."""
        layers = exact_layers(self._probe.setup.model)
        if made.micro_batches == 1 or not layers or self._probe.setup.device.type != "cpu":
            return made
        whole = Planner(planner.task, planner.ways, planner.clock, planner.notes, planner.ladder).stated(
            Rows(self._rows)
        )
        said = (
            f"Batch norm is exact in {layers[0]}, so the graphs of all micro-batches are joined, and the logical batch "
            f"of {self._rows} rows takes {say_bytes(whole.peak_bytes)} however it is cut, and there are "
            f"{say_bytes(whole.budget_bytes)}."
        )
        return replace(whole, reasons=(said, *whole.reasons[1:]))

    def _finished(self, made: Plan) -> Plan:
        """Let the plan be applied, and say so where a cut changes what a layer computes."""
        made = replace(made, hand=apply)
        layers = batch_dependent_layers(self._probe.setup.model)
        if made.micro_batches == 1 or not layers:
            return made
        said = (
            f"Layers that compute over the rows that they see: {', '.join(layers[:5])}{' ...' * (len(layers) > 5)}. "
            "A cut is refused unless you decide otherwise: wb.exact_batch_norm, wb.convert_batch_norm, "
            'wb.freeze_batch_norm, or batch_norm="per_micro_batch".'
        )
        return replace(made, reasons=(*made.reasons, said))

    def _all_lengths(self) -> tuple[int, ...] | None:
        """The lengths of a logical batch, as the sample has them."""
        if self._lengths is None:
            return None
        times = math.ceil(self._rows / len(self._lengths))
        return tuple(sorted(self._lengths * times, reverse=True)[:: max(1, times * len(self._lengths) // self._rows)])[
            : self._rows
        ]

    def _clock(self, sizes: Sequence[int], way: Way) -> dict[int, float]:
        """Time passes, from small to large, as long as the next one is not too long."""
        row = self._rows_of[max(self._rows_of)]
        model = self._probe.setup.model
        with recomputing(model, way.blocks), offloading(model) if way.offload else nullcontext():
            return clock(self._probe, sizes, row, patience=PATIENCE)
