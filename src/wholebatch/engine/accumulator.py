"""The loop: one logical batch, micro-batch by micro-batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from wholebatch.core.batch import Layout, LogicalBatch, paths
from wholebatch.core.budget import parse_bytes
from wholebatch.core.errors import SplitError
from wholebatch.core.record import Update
from wholebatch.core.schedules.schedule import Schedule
from wholebatch.core.split import Indices, Rows, Tokens
from wholebatch.core.weights import Count, Reduction
from wholebatch.core.window import check_number
from wholebatch.engine import memory
from wholebatch.engine.arguments import check_arguments, require_a_size
from wholebatch.engine.checkpoint.state import state_of, take_over
from wholebatch.engine.checks.check import FirstCheck
from wholebatch.engine.copies import NotCopied
from wholebatch.engine.fit.cutting import Cutting, Place
from wholebatch.engine.fit.fitting import Fitting
from wholebatch.engine.fit.splitting import Splitting
from wholebatch.engine.forward import Forward
from wholebatch.engine.heap import keep_freed_blocks
from wholebatch.engine.loading import Loading
from wholebatch.engine.making import Making
from wholebatch.engine.meetings.lockstep import Execution, Lockstep
from wholebatch.engine.meetings.singly import OneByOne
from wholebatch.engine.narrow import SumIn, check_sum_in
from wholebatch.engine.noise import noise_of
from wholebatch.engine.objective import LossFn, Objective, TargetsFn
from wholebatch.engine.opening import Windows, gradient_sum
from wholebatch.engine.precision import Format, Precision
from wholebatch.engine.ranks.balancing import Balance, Balancing
from wholebatch.engine.ranks.membership import Communication
from wholebatch.engine.ranks.reduction import ReduceIn
from wholebatch.engine.ranks.repeats import say_repeated_rows
from wholebatch.engine.reasons import Reasons
from wholebatch.engine.rules import BatchNorm, OnNonFinite, Rules
from wholebatch.engine.setup import Setup
from wholebatch.engine.steps.consuming import check_clip_norm
from wholebatch.engine.transaction import Transaction
from wholebatch.engine.versions import Versions
from wholebatch.engine.window import Window


class Accumulator(NotCopied):
    """Trains a model as if every logical batch fit into memory as a whole.

    Three ways in: `step` takes a logical batch and cuts it, `updates` takes a loader that already yields
    micro-batches, and `window` is for a loop that its owner wants to keep. All make the same update:

        L = (sum over the targets of the logical batch of their losses) / (number of these targets),

    one gradient of L, clipped once, and one step of the optimizer; or no step at all, with the reason in the record.

    Args:
        model: The module whose parameters learn: as it is, in `DistributedDataParallel`, or sharded with
            `torch.distributed.fsdp.fully_shard`. Under `torch.distributed` all ranks make each update together.
        optimizer: Any `torch.optim.Optimizer` that needs no closure, or several that each step a part of the model.
        loss_fn: ``loss_fn(model, micro_batch)`` returns a scalar tensor, or ``(loss_sum, targets)``, or ``(loss_sum,
            targets, once)`` where `once` is a term, such as a regulariser, that acts once a window. May be left out
            for `window`.
        targets: ``targets(micro_batch)`` counts what the loss averages over, such as unmasked tokens. Default: its
            rows.
        reduction: What `loss_fn` returns: ``"mean"`` over its targets, or their ``"sum"``.
        micro_batch: ``wb.Rows(8)``, ``wb.Tokens(4096, length=...)``, or ``"auto"``: the whole batch if it fits, else
            the fastest that does, planned from a few rows of the first batch.
        memory: What training may take in all, such as ``"2GiB"``, or a number of bytes. None: what the device has free.
        collate: Turns a list of rows into a micro-batch; with it a logical batch is a list of rows.
        whole: Paths of tensors that each micro-batch gets as a whole, such as ``["image"]``.
        dims: The dimension on which rows lie, for all tensors or by path, such as ``{"image": 1}``. Default 0.
        precision: ``"fp32"`` (as the weights are), ``"bf16"`` or ``"fp16"``: autocast around `loss_fn`, with a
            dynamic loss scale for fp16.
        accumulate_in: How gradients of 16-bit weights are summed: ``"fp32"`` (default), ``"compensated"`` (24 bits) or
            ``"weights"``. Wider weights always sum in their own dtype.
        clip_norm: Largest 2-norm of the logical batch's gradient; clipped once.
        lr_scheduler: One schedule or several, stepped once an applied update.
        on_nonfinite: What an infinite or undefined loss or gradient does: ``"skip"`` the whole update, or ``"raise"``.
        batch_norm: ``"refuse"`` to cut a batch that a layer computes over, or let it compute ``"per_micro_batch"``.
        lockstep: How micro-batches meet (`wb.gather`): ``"replay"`` one by one after a first pass without graphs,
            ``"joined"`` in one graph, or ``"auto"``: replay unless a meeting needs the gradient of an earlier one.
        check: ``"first"`` compares the gradient of a few rows of the first batch, cut and uncut, before training;
            None: off.
        reduce_in: The dtype in which gradients travel between ranks: ``"fp32"``, or ``"bf16"`` for half the bytes and
            8 bits of each number. None: as they are summed.
        communication: For sharded weights: ``"once"`` gathers them and reduces gradients once a window, holding all of
            both meanwhile; ``"each"`` does so with every pass, and holds no more than a layer and a share.
        loss_scaler: A `torch.amp.GradScaler` that losses are scaled with, in whichever precision; it is lowered and
            raised by this accumulator. None: ``precision="fp16"`` makes one of its own, and others have none.
        before_step: Called once an update that is to be applied, when the gradient of the logical batch is in
            ``.grad``, divided and clipped, and before an optimizer steps: to look at it, or to change it.
        noise_scale: Whether the gradient noise scale is measured, from micro-batches against their window, and put
            into the record; or over how many windows it is averaged, 30 by default. It takes windows of two
            micro-batches or more, whose rows were not sorted.
        balance: ``"tokens"`` lets rows of each logical batch that `step` is handed move between ranks, so that all have
            equally much to do; with `collate`. None: each rank trains on the rows that it is handed.

    Attributes:
        reasons: What was chosen automatically, and why; one sentence each.
        counts_first: Whether `step` counts the targets of a list of rows before the first forward pass, so that losses
            are divided once, by the count of all; then all its micro-batches are collated at the same time.
        noise: The averages of which the noise scale is made, where it is measured; else None.

    Raises:
        OptimizerError: Model, optimizer and scheduler do not belong together.
        WeightError, LossError, ConfigError: An argument is not one of those above.

    Example:
        >>> import torch
        >>> import wholebatch as wb
        >>> model = torch.nn.Linear(3, 1)
        >>> accumulator = Accumulator(
        ...     model,
        ...     torch.optim.SGD(model.parameters(), lr=0.1),
        ...     lambda model, batch: torch.nn.functional.mse_loss(model(batch["x"]), batch["y"]),
        ...     micro_batch=wb.Rows(4),
        ... )
        >>> update = accumulator.step({"x": torch.ones(10, 3), "y": torch.zeros(10, 1)})
        >>> update.micro_batches, update.rows, update.skipped
        (3, 10, None)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        loss_fn: LossFn | None = None,
        *,
        targets: TargetsFn | None = None,
        reduction: Reduction = "mean",
        micro_batch: Literal["auto"] | Rows | Tokens = "auto",
        memory: str | int | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        whole: Iterable[str] = (),
        dims: int | Mapping[str, int] | None = None,
        precision: Format = "fp32",
        accumulate_in: SumIn | None = None,
        clip_norm: float | None = None,
        lr_scheduler: Any | Sequence[Any] | None = None,
        on_nonfinite: OnNonFinite = "skip",
        batch_norm: BatchNorm = "refuse",
        lockstep: Execution = "auto",
        check: Literal["first"] | None = "first",
        reduce_in: ReduceIn | None = None,
        communication: Communication = "once",
        balance: Balance | None = None,
        loss_scaler: torch.amp.GradScaler | None = None,
        before_step: Callable[[], object] | None = None,
        noise_scale: bool | int = False,
    ) -> None:
        check_arguments(
            micro_batch=micro_batch,
            collate=collate,
            clip_norm=clip_norm,
            before_step=before_step,
            reduce_in=reduce_in,
            balance=balance,
            on_nonfinite=on_nonfinite,
            batch_norm=batch_norm,
            lockstep=lockstep,
            check=check,
        )
        self._reasons = say = Reasons()
        self.reasons = say.said
        self.counts_first = False
        self._setup = Setup.of(
            model,
            optimizer,
            lr_scheduler,
            reduce_in=reduce_in,
            communication=communication,
            measures=noise_scale is not False,
            say=say,
        )
        noise = noise_of(noise_scale, self._setup.optimizers, micro_batch, say)
        self.noise = noise.average if noise is not None else None
        check_clip_norm(self._setup.optimizers, clip_norm)
        objective = Objective(loss_fn, targets, reduction)
        self._precision = Precision(precision, self._setup.device, loss_scaler)
        sum_in = check_sum_in(accumulate_in)
        rules = Rules(
            setup=self._setup,
            sums=gradient_sum(self._setup, sum_in),
            transaction=Transaction(model, self._setup.device),
            precision=self._precision,
            reduction=objective.reduction,
            clip_norm=clip_norm,
            on_nonfinite=on_nonfinite,
            batch_norm=batch_norm,
            before_step=before_step,
            noise=noise,
        )
        self._layout = Layout(collate, paths(whole), dims)
        wire = self._setup.group.wire
        self._balancing = (
            Balancing(wire, self._layout, micro_batch, self._setup.device, say)
            if balance is not None and wire
            else None
        )
        budget = parse_bytes(memory) if memory is not None else None
        self._setup.update.budgeted = budget is not None
        if budget is None and self._setup.device.type == "cpu":
            keep_freed_blocks()
        fitting = Fitting(
            self._setup, objective, self._precision, sum_in, budget, collate, self._layout.whole, self._layout.dims
        )
        self._cutting = Cutting(micro_batch, fitting)
        self._windows = Windows(rules, sum_in)
        self._lockstep = Lockstep(lockstep, model, self._setup.device, self._setup.group)
        forward = Forward(self._setup, objective, self._precision)
        if self._setup.group.in_step:
            require_a_size(micro_batch)
        first_check = FirstCheck(forward, self._cutting, check == "first" and not self._setup.group.in_step, say)
        self._making = Making(self._windows, forward, self._lockstep, first_check, say)
        splitting = Splitting(self._windows, forward, self._layout, say)
        self._loading = Loading(
            self._windows, forward, self._lockstep, self._making, first_check, splitting, self._layout
        )

    def step(self, batch: Any) -> Update:
        """Make one update from a logical batch.

        Args:
            batch: A list of rows, if the accumulator has `collate`; else a pytree of tensors. None is a batch without
                targets. Of several ranks each hands in rows of its own, or none.

        Returns:
            The record of the update, or of why there was none.

        Raises:
            SplitError: The batch is empty, or its parts disagree on how many rows there are.
            BatchNormError: The batch is cut, and a layer in training mode computes over the rows that it sees.
            VerifyError: The first batch shows that the cut changes the gradient.
            OutOfMemoryError: A single row does not fit, or not into the budget (then nothing was tried), or memory ran
                out when a part of the weights had moved. Where several rows do not fit together, the same logical
                batch is cut finer and tried again.
            LossError, WeightError, NonFiniteError, WindowError: See `Window.close`.
            RankError: Another rank failed, or is gone.
            Exception: What the loss function raised, as it is. In every case weights, gradients, buffers and random
                state are those of before.
        """
        group = self._setup.group
        if group.ranks == 1:
            if batch is None:
                return self.window().close()
            rows = self._layout.logical(batch)
            if rows.rows == 0:
                raise SplitError(
                    "The logical batch is empty: it holds no rows.", hint="leave empty batches out of the loader."
                )
            return self._step(rows)
        shared = self._balancing.shared(batch) if self._balancing is not None else None
        with group.together(self._windows.renew_sums):
            return self._step(shared if shared is not None else self._layout.logical_or_nothing(batch))

    def _step(self, rows: LogicalBatch) -> Update:
        """Make one update from a logical batch of which this process has some rows, or none."""
        group = self._setup.group
        if self.counts_first or self._windows.rules.sums.consumes:  # the latter need targets before a backward pass
            rows.keep()
        versions = Versions(rows.given) if not rows.collates else None
        retries = 0
        while True:
            cut, padding = self._cutting.cut(rows, self._reasons) if rows.rows else ([], None)
            made = self._making.attempt(rows, cut, padding)
            if isinstance(made, Update):
                return replace(made, retries=retries) if retries else made
            memory.free_cached(self._setup.device)
            if versions is not None:
                versions.require()
            sizes = made.elsewhere
            if not sizes:
                self._cutting.take_finer(rows, cut, made, self._reasons)
                sizes = group.report_shortage(made.said, self._cutting.size)
            self._cutting.follow(sizes, self._reasons)
            retries += 1

    def updates(self, loader: Iterable[Any], *, micro_batches: int | Schedule) -> Iterator[Update]:
        """Make updates from a loader that already yields micro-batches.

        The tail is an update of its own, weighted by what is in it; nothing is left over for the next epoch. A
        micro-batch for which memory runs out is undone, split by rows, and tried again.

        Args:
            loader: Yields micro-batches; its length need not be known. None takes its place in a window and adds
                nothing.
            micro_batches: How many make one logical batch, of each rank; or one of `wb.schedules` that says so for each
                logical batch, by how many windows came before it.

        Yields:
            The record of each update, as soon as it has happened.

        Raises:
            WindowError: `micro_batches` is less than 1, or a window is open.
            Exception: As in `step`; an exception in the loader leaves as it is, after the open window was rolled back.
        """
        if self._setup.group.ranks > 1:
            say_repeated_rows(loader, self._reasons)
        return self._loading.updates(loader, micro_batches)

    def window(self, *, targets: Count | None = None, micro_batches: int = 1) -> Window:
        """Open a window for a loop that its owner keeps.

        Args:
            targets: The targets of the whole window, if they are known beforehand: then losses are divided before their
                backward passes instead of the gradient at the close. Unit: targets.
            micro_batches: About how many micro-batches will come, if known; it only keeps float16 in range.

        Returns:
            The open window: `Window.backward`, then `Window.close` or `Window.rollback`.

        Raises:
            WindowError: The last window is still open, or `micro_batches` is no number of them.
        """
        check_number(micro_batches)
        window = self._windows.open(
            targets=targets,
            micro_batches=micro_batches,
            company=OneByOne(self._setup.group.ranks),
            goes_on=True,
        )
        window.steps_again = True
        return window

    def add(self, micro_batch: Any, *, last: bool = False) -> Window:
        """Add a micro-batch to the open window, or to one that is opened for it, as `updates` does.

        For a loop of somebody else's, that hands in one micro-batch after the other: where memory runs out in it, it is
        undone, split by rows, and tried again.

        Args:
            micro_batch: As `loss_fn` takes it. None takes its place in a window and adds nothing.
            last: Whether it is known to be the last of this process in its window, so that ranks can speak during its
                backward pass.

        Returns:
            The window, which is still open: close it, or roll it back.

        Raises:
            Exception: As in `updates`, but a window that is open stays so where `loss_fn` raises and no part of the
                micro-batch is in it.
        """
        window = self._windows.current or self.window()
        self._loading.add(window, micro_batch, last)
        return window

    @property
    def meets(self) -> bool:
        """Whether it is known that the micro-batches of a window meet."""
        return self._lockstep.meets

    def make(self, rows: LogicalBatch, cut: Sequence[Indices]) -> Update:
        """Make one update from a logical batch in one cut, whatever the rule of cutting says."""
        return self._making.make(rows, cut, None, Place())

    @property
    def open_window(self) -> Window | None:
        """The window that is open, or None: for a handle that was lost, as in a notebook."""
        return self._windows.current

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next process needs, also in the middle of a window; see `wb.save`.

        Tensors are those of the run, as in `torch.nn.Module.state_dict`: copy them to keep them while it goes on. All
        ranks ask for it together, and each gets its own; of what is spread over ranks, its share.

        Raises:
            ConfigError: A schedule does not say where it is.
            WindowError: `step` or a backward pass is under way.
            RankError: Another rank has no state to keep.
        """
        return state_of(self._windows, self._precision)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` has returned; see `wb.load`.

        Args:
            state: It is copied.

        Raises:
            ConfigError: Model, optimizers, schedules, precision or ranks are not those of the state; nothing has
                changed.
            WindowError: A window is open.
            RankError: Another rank cannot take over its own.
        """
        take_over(self._windows, self._precision, state)

    @property
    def loss_scale(self) -> dict[str, Any] | None:
        """The state of the dynamic loss scale, as `torch.amp.GradScaler` has it; None where there is none."""
        return self._precision.state_dict()

    @loss_scale.setter
    def loss_scale(self, state: Mapping[str, Any] | None) -> None:
        self._precision.require(state)
        self._precision.load_state_dict(state)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which this accumulator runs forward passes, for loops with `window`."""
        return self._precision.autocast()
