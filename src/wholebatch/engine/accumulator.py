"""The loop: one logical batch, micro-batch by micro-batch."""

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from operator import is_
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from wholebatch.core.batch import LogicalBatch, count_rows
from wholebatch.core.budget import parse_bytes
from wholebatch.core.errors import ConfigError, MeetingError, OutOfMemoryError, SplitError, WindowError
from wholebatch.core.record import Update
from wholebatch.core.split import Indices, Rows, Tokens, side_by_side
from wholebatch.core.weights import Count, Reduction, check_count
from wholebatch.core.window import group
from wholebatch.engine import memory
from wholebatch.engine.batchnorm import require_row_by_row
from wholebatch.engine.check import check_first
from wholebatch.engine.company import Again, Company, OneByOne, Scout, Seat, leave, sit_down
from wholebatch.engine.consuming import check_clip_norm
from wholebatch.engine.cutting import Cutting, Place, Shortage
from wholebatch.engine.device import move
from wholebatch.engine.fitting import Fitting
from wholebatch.engine.lockstep import Execution, Lockstep
from wholebatch.engine.objective import LossFn, Objective, Part, TargetsFn, plain_count
from wholebatch.engine.precision import Format, Precision
from wholebatch.engine.setup import OnNonFinite, Setup
from wholebatch.engine.sums import GradientSum, SumIn, check_sum_in
from wholebatch.engine.transaction import Transaction
from wholebatch.engine.window import BatchNorm, Rules, Window

_log = logging.getLogger("wholebatch")


class Accumulator:
    """Trains a model as if every logical batch fit into memory as a whole.

    Three ways in: `step` takes a logical batch and cuts it, `updates` takes a loader that already yields
    micro-batches, and `window` is for a loop that its owner wants to keep. All make the same update:

        L = (sum over the targets of the logical batch of their losses) / (number of these targets),

    one gradient of L, clipped once, and one step of the optimizer; or no step at all, with the reason in the record.

    Args:
        model: The module whose parameters learn.
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

    Attributes:
        reasons: What was chosen automatically, and why; one sentence each.

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
    ) -> None:
        _check_choice("on_nonfinite", on_nonfinite, ("skip", "raise"))
        _check_choice("batch_norm", batch_norm, ("refuse", "per_micro_batch"))
        _check_choice("lockstep", lockstep, ("auto", "replay", "joined"))
        _check_choice("check", check, ("first", None))
        if micro_batch != "auto" and not isinstance(micro_batch, Rows | Tokens):
            raise ConfigError(
                f"micro_batch={micro_batch!r} says nothing about which rows go together.",
                hint='pass wb.Rows(8), wb.Tokens(4096, length=...) or "auto".',
            )
        if clip_norm is not None and not clip_norm > 0:
            raise ConfigError(
                f"clip_norm={clip_norm!r} would leave nothing of a gradient.", hint="pass a norm above 0, or None."
            )
        self._setup = Setup.of(model, optimizer, lr_scheduler)
        check_clip_norm(self._setup.optimizers, clip_norm)
        self._objective = Objective(loss_fn, targets, reduction)
        self._precision = Precision(precision, self._setup.device)
        self._sum_in = check_sum_in(accumulate_in)
        self._rules = Rules(
            setup=self._setup,
            sums=self._gradient_sum(),
            transaction=Transaction(model, self._setup.device),
            precision=self._precision,
            reduction=self._objective.reduction,
            clip_norm=clip_norm,
            on_nonfinite=on_nonfinite,
            batch_norm=batch_norm,
        )
        self._lockstep = Lockstep(lockstep, model, self._setup.device)
        self._collate = collate
        self._whole = tuple(whole)
        self._dims = dims
        budget = parse_bytes(memory) if memory is not None else None
        self._setup.update.budgeted = budget is not None
        fitting = Fitting(
            self._setup, self._objective, self._precision, self._sum_in, budget, collate, self._whole, dims
        )
        self._cutting = Cutting(micro_batch, fitting)
        self._accelerated = self._setup.device.type != "cpu"
        self._unchecked = check == "first"
        self._window: Window | None = None
        self._windows = 0
        self._seat: Seat | None = None
        self.reasons: list[str] = []
        guard = _guard(weakref.ref(self))
        for each in self._setup.optimizers:
            hook = each.register_step_pre_hook(guard)
            weakref.finalize(self, hook.remove)

    def step(self, batch: Any) -> Update:
        """Make one update from a logical batch.

        Args:
            batch: A list of rows, if the accumulator has `collate`; else a pytree of tensors. None is a batch without
                targets.

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
            Exception: What the loss function raised, as it is. In every case weights, gradients, buffers and random
                state are those of before.
        """
        if batch is None:
            return self.window().close()
        rows = LogicalBatch(batch, collate=self._collate, whole=self._whole, dims=self._dims)
        if self._rules.sums.consumes:  # the targets must be known before the first backward pass
            rows.keep()
        if rows.rows == 0:
            raise SplitError(
                "The logical batch is empty: it holds no rows.", hint="leave empty batches out of the loader."
            )
        retries = 0
        while True:
            cut, share = self._cutting.cut(rows, self._say)
            made = self._attempt(rows, cut, share)
            if isinstance(made, Update):
                return replace(made, retries=retries) if retries else made
            memory.free_cached(self._setup.device)
            self._cutting.take_finer(rows, cut, made, self._say)
            retries += 1

    def _attempt(self, rows: LogicalBatch, cut: Sequence[Indices], share: float | None) -> Update | Shortage:
        """Return the update of a logical batch in one cut, or what is known of a shortage of memory that undid it."""
        place = Place()
        try:
            return self._make(rows, cut, share, place)
        except Exception as error:
            if not memory.is_out_of_memory(error) or isinstance(error, OutOfMemoryError):
                raise
            # Only words leave this block: the error's traceback holds the tensors of the attempt.
            return Shortage((str(error).strip() or type(error).__name__).splitlines()[0], place.rows)

    def _make(self, rows: LogicalBatch, cut: Sequence[Indices], share: float | None, place: Place) -> Update:
        """Make one update from a logical batch in one cut, noting where it is."""
        if len(cut) > 1:
            if self._rules.batch_norm == "refuse":
                require_row_by_row(self._setup.model)
            self._check(rows, max(cut, key=len))
        # Rows of a list are collated once, when their turn comes, so that the padded logical batch never exists.
        counts: list[Count | None] = [None] * len(cut)
        if self._objective.targets is None:
            counts = [len(part) for part in cut]
        elif self._collate is None or rows.kept is not None:
            counts = [self._objective.count(rows.take(part), len(part)) for part in cut]
        known = [count for count in counts if count is not None]
        total = sum(known) if len(known) == len(cut) else None
        opened = {"targets": total, "micro_batches": len(cut), "padding": share}
        update = None
        if len(cut) == 1 or not self._lockstep.meets:

            def pass_each(window: Window) -> None:
                for part, count in zip(cut, counts, strict=True):
                    place.rows = len(part)
                    self._pass(window, rows.take(part), len(part), count)
                place.rows = None

            update = self._try(pass_each, Scout() if len(cut) > 1 else None, **opened)
        while update is None:  # they meet
            takes = [partial(rows.take, part) for part in cut]
            update = self._meet(takes, list(map(len, cut)), counts, cut, place, **opened)
        return update

    def _try(self, fill: Callable[[Window], None], company: Scout | None, **opened: Any) -> Update | None:
        """Return the update of a window that is filled, or None where it has to be made again, knowing more."""
        window = self._open(row_by_row=True, company=company, **opened)
        try:
            fill(window)
            if company is not None:
                company.require_alone()
            return window.close()
        except BaseException as error:
            if window.is_open:
                window.rollback()
            if not isinstance(error, Again):
                raise
            self._lockstep.learn(error)
            self._windows -= 1
        return None

    def _meet(
        self,
        takes: Sequence[Callable[[], Any]],
        rows: Sequence[int | None],
        counts: Sequence[Count | None],
        cut: Sequence[Indices] | None,
        place: Place,
        **opened: Any,
    ) -> Update | None:
        """Return the update of micro-batches that meet, or None where it has to be made again, knowing more."""
        runs = [partial(self._run, *each) for each in zip(takes, rows, counts, strict=True)]

        def meet(window: Window) -> None:
            self._lockstep.run(window, self._rules.transaction, runs, rows, cut, place, self._say)

        return self._try(meet, None, **opened)

    def updates(self, loader: Iterable[Any], *, micro_batches: int) -> Iterator[Update]:
        """Make updates from a loader that already yields micro-batches.

        The tail is an update of its own, weighted by what is in it; nothing is left over for the next epoch.

        Args:
            loader: Yields micro-batches; its length need not be known. None takes its place in a window and adds
                nothing.
            micro_batches: How many make one logical batch.

        Yields:
            The record of each update, as soon as it has happened.

        Raises:
            WindowError: `micro_batches` is less than 1, or a window is open.
            Exception: As in `step`; an exception in the loader leaves as it is, after the open window was rolled back.
        """
        window: Window | None = None
        held: list[Any] | None = None  # the micro-batches of a window that meet
        unlearned: list[Any] = []  # those without targets, that may have to meet others yet
        scout = Scout() if micro_batches > 1 else None
        try:
            for micro_batch, closes in group(loader, micro_batches):
                if window is None and held is None:
                    held = [] if micro_batches > 1 and self._lockstep.meets else None
                if window is None and held is None:
                    window = self._open(micro_batches=micro_batches)
                if micro_batch is not None:
                    if self._unchecked and micro_batches > 1:
                        self._check_loaded(micro_batch)
                    if window is not None:
                        seat = sit_down(scout)
                        try:
                            self._pass(window, micro_batch, self._count_rows(micro_batch), None)
                            if window.is_empty and scout is not None:
                                unlearned.append(micro_batch)
                        except Again as again:
                            self._require_first(window, again)
                            window, held = None, unlearned
                        finally:
                            leave(seat)
                    if held is not None:
                        held.append(micro_batch)
                    del micro_batch
                if closes:
                    update = window.close() if window is not None else self._update_of(held or [])
                    window, held, unlearned = None, None, []
                    yield update
        except BaseException:
            if window is not None and window.is_open:
                window.rollback()
            raise

    def _require_first(self, window: Window, again: Again) -> None:
        """Undo a window whose first micro-batch has come to a meeting; refuse it if others have run without one."""
        empty = window.is_empty
        window.rollback()
        self._windows -= 1
        if not empty:
            raise MeetingError(
                f"{again.why}, and an earlier micro-batch of this window ended without meeting.",
                hint="let every micro-batch make the same meetings in the same order.",
            )
        self._lockstep.learn(again)

    def _update_of(self, micro_batches: Sequence[Any]) -> Update:
        """Make one update from micro-batches that somebody else has cut, and that meet."""
        rows = [self._count_rows(each) for each in micro_batches]
        takes = [partial(_itself, each) for each in micro_batches]
        if len(micro_batches) < 2:

            def pass_each(window: Window) -> None:
                for micro_batch in micro_batches:
                    self._pass(window, micro_batch, rows[0], None)

            update = self._try(pass_each, None)
            assert update is not None
            return update
        if self._rules.batch_norm == "refuse":
            require_row_by_row(self._setup.model)
        update = None
        while update is None:
            update = self._meet(
                takes, rows, [None] * len(rows), side_by_side(rows), Place(), micro_batches=len(micro_batches)
            )
        return update

    def window(self, *, targets: Count | None = None, micro_batches: int = 1) -> Window:
        """Open a window for a loop that its owner keeps.

        Args:
            targets: The targets of the whole window, if they are known beforehand: then losses are divided before their
                backward passes instead of the gradient at the close. Unit: targets.
            micro_batches: About how many micro-batches will come, if known; it only keeps float16 in range.

        Returns:
            The open window: `Window.backward`, then `Window.close` or `Window.rollback`.

        Raises:
            WindowError: The last window is still open.
        """
        return self._open(targets=targets, micro_batches=micro_batches, company=OneByOne())

    @property
    def meets(self) -> bool:
        """Whether it is known that the micro-batches of a window meet."""
        return self._lockstep.meets

    def make(self, rows: LogicalBatch, cut: Sequence[Indices]) -> Update:
        """Make one update from a logical batch in one cut, whatever the rule of cutting says."""
        return self._make(rows, cut, None, Place())

    @property
    def open_window(self) -> Window | None:
        """The window that is open, or None: for a handle that was lost, as in a notebook."""
        return self._window

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which this accumulator runs forward passes, for loops with `window`."""
        return self._precision.autocast()

    def _open(
        self,
        *,
        targets: Count | None = None,
        micro_batches: int = 1,
        padding: float | None = None,
        row_by_row: bool = False,
        company: Company | None = None,
    ) -> Window:
        if self._window is not None:
            raise WindowError(
                "A window is open already, and two of one accumulator would share its gradient.",
                hint="close or roll back the first one (accumulator.open_window); a second model or optimizer takes an "
                "accumulator of its own.",
            )
        parameters = self._setup.parameters
        summed = self._rules.sums.parameters
        if len(parameters) != len(summed) or not all(map(is_, parameters, summed)):  # a parameter group was added
            self._rules = replace(self._rules, sums=self._gradient_sum())
        if targets is not None:
            targets = plain_count(targets)
            check_count(targets)
            targets = None if not isinstance(targets, Tensor) and targets == 0 else targets
        self._windows += 1
        self._window = Window(
            self._rules,
            number=self._windows,
            targets=targets,
            micro_batches=micro_batches,
            padding=padding,
            row_by_row=row_by_row,
            company=company if isinstance(company, OneByOne) else None,
            ended=self._ended,
        )
        self._seat = sit_down(company)
        return self._window

    def _gradient_sum(self) -> GradientSum:
        setup = self._setup
        return GradientSum(setup.parameters, setup.bystanders, self._sum_in, setup.consumption())

    def _ended(self) -> None:
        self._window = None
        if self._seat is not None:
            leave(self._seat)

    def _run(
        self, take: Callable[[], Any], rows: int | None, count: Count | None, *, graph: bool = True
    ) -> Part | None:
        """Run one micro-batch of those that meet through the model, also where it holds no target."""
        micro_batch = take()
        if count is None:
            count = self._objective.count(micro_batch, rows)
        graph = graph and (isinstance(count, Tensor) or count != 0)
        micro_batch = move(micro_batch, self._setup.device)
        with self._precision.autocast():
            return self._objective(self._setup.model, micro_batch, count, graph=graph)

    def _pass(self, window: Window, micro_batch: Any, rows: int | None, count: Count | None) -> None:
        """Run one micro-batch through the model and add its gradient to the window's."""
        objective, setup = self._objective, self._setup
        if count is None:
            count = objective.count(micro_batch, rows)
        if not isinstance(count, Tensor) and count == 0:
            window.leave_out(rows=rows)
            return
        if self._accelerated:
            micro_batch = move(micro_batch, setup.device)
        if not window.row_by_row:
            window.before_forward()
        if self._precision.as_is:
            part = objective(setup.model, micro_batch, count)
        else:
            with self._precision.autocast():
                part = objective(setup.model, micro_batch, count)
        del micro_batch
        if part is None:
            window.leave_out(rows=rows)
        else:
            window.add(part, rows=rows)

    def _check(self, rows: LogicalBatch, largest: Indices) -> None:
        if self._unchecked:
            rule = self._cutting.micro_batch
            lengths = rows.lengths(rule.length) if isinstance(rule, Tokens) else None
            self._say(
                check_first(
                    self._setup.model, self._objective, rows, largest, lengths=lengths, precision=self._precision
                )
            )
            self._unchecked = False

    def _count_rows(self, micro_batch: Any) -> int | None:
        return count_rows(micro_batch, whole=self._whole, dims=self._dims)

    def _check_loaded(self, micro_batch: Any) -> None:
        num_rows = self._count_rows(micro_batch)
        if num_rows is None:
            self._unchecked = False
            self._say(
                "The first batch was not compared cut and uncut: its tensors disagree on how many rows there are."
            )
        elif num_rows > 1:
            self._check(LogicalBatch(micro_batch, whole=self._whole, dims=self._dims), range(num_rows))

    def _say(self, reason: str | None, level: int = logging.INFO) -> None:
        if reason is not None and reason not in self.reasons:
            self.reasons.append(reason)
            _log.log(level, reason)


def _itself(micro_batch: Any) -> Any:
    return micro_batch


def _guard(accumulator: "weakref.ref[Accumulator]") -> Callable[..., None]:
    """A hook that keeps an optimizer from stepping inside an open window."""

    def refuse(*_arguments: object) -> None:
        owner = accumulator()
        if owner is not None and owner._window is not None and not owner._setup.stepping:
            raise WindowError(
                "The optimizer was stepped inside an open window, before its gradient was that of the logical batch.",
                hint="leave out optimizer.step(): window.close() steps, once, at the end.",
            )

    return refuse


def _check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"{name}={value!r} is not one of the choices.",
            hint="pass " + " or ".join(f"{name}={choice!r}" for choice in allowed) + ".",
        )
