"""What does this model need here? Small looks at a model, on fake tensors or real ones, that leave no trace."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wholebatch.core.batch import LogicalBatch
from wholebatch.core.errors import LossError
from wholebatch.core.need import Need, Passes
from wholebatch.core.trace import Size, Trace, few_looks
from wholebatch.core.tree import map_leaves
from wholebatch.engine import memory
from wholebatch.engine.device import move
from wholebatch.engine.fit.blocks import Ledger
from wholebatch.engine.fit.clock import now
from wholebatch.engine.fit.fakes import Fakes
from wholebatch.engine.fit.resident import beside_passes
from wholebatch.engine.fit.room import available_bytes
from wholebatch.engine.fit.sample import Sample
from wholebatch.engine.fit.timeline import Timeline
from wholebatch.engine.narrow import SumIn
from wholebatch.engine.objective import Objective
from wholebatch.engine.precision import Precision
from wholebatch.engine.setup import Setup
from wholebatch.engine.steps.consuming import consumed_by, forgetting
from wholebatch.engine.sums import GradientSum
from wholebatch.engine.transaction import Transaction


@dataclass
class Probe:
    """Looks at what a training job takes.

    Attributes:
        setup: Model and optimizers.
        objective: The declared loss.
        precision: In which forward passes run.
        sum_in: How 16-bit gradients are summed.
        sample: Rows to look with.
        reasons: What could not be looked at as it should, and why.
        unfollowed: Why fake tensors do not get through the model; None: they do, as far as was tried.
        row_seconds: What a row took at least in the passes that were looked at, the looking included. Unit: seconds.
    """

    setup: Setup
    objective: Objective
    precision: Precision
    sum_in: SumIn
    sample: Sample
    reasons: list[str] = field(default_factory=list)
    unfollowed: str | None = None
    row_seconds: float = float("inf")

    @property
    def device(self) -> torch.device:
        """Where the model takes its input."""
        return self.setup.device

    def beside(self) -> tuple[dict[str, int], int]:
        """Return what training takes beside its passes, as `beside_passes` says it."""
        return beside_passes(self.setup, self.sum_in, self.reasons)

    def need(self, sizes: Sequence[Size], rows_of: Mapping[int, int], *, limit: int | None = None) -> Need:
        """Return what training takes, from passes on fake tensors; on real ones where those do not get through.

        Args:
            sizes: Two numbers of rows, each with the same lengths.
            rows_of: For each length a row of the sample that is so long.
            limit: What real passes may take above what is there; None: anything. Unit: bytes.

        Raises:
            OverBudget: Real passes had to be made and took more than the limit.
        """
        resident, step = self.beside()
        if self.unfollowed is None:
            try:
                return Need(resident, Passes.of(self._fake_traces(Fakes(), sizes, rows_of)), step)
            except Exception as error:
                self.unfollowed = memory.kind_in_a_line(error)
        self.reasons.append(
            f"The model was run for real on {' and '.join(str(rows) for rows in sorted({r for r, _ in sizes}))} "
            f"rows to see what it takes, since it cannot be followed on fake tensors ({self.unfollowed})."
        )
        traces, _ = self.real_traces(sizes, rows_of, limit=limit)
        return Need(resident, Passes.of(traces), step)

    def real_traces(
        self, sizes: Sequence[Size], rows_of: Mapping[int, int], *, limit: int | None = None, micro_batches: int = 2
    ) -> tuple[dict[Size, Trace], set[str]]:
        """Return what came and went in real passes, and which operations take memory that cannot be seen.

        Args:
            sizes: As for `need`.
            rows_of: The same.
            limit: The same.
            micro_batches: One, where nothing is to be cut, or two.

        Raises:
            OverBudget: They took more than the limit.
        """
        hidden: set[str] = set()

        def look(size: Size) -> Trace:
            rows, length = size
            batch = self.sample.repeat(rows_of[length], micro_batches * rows)
            timeline = Timeline(self.device, limit)
            timeline.ignore(list(_tensors_of(self.setup.model)))
            start = now(self.device)
            with timeline:
                self._passes(self._micro_batches(batch, rows), self.setup.parameters, timeline)
            self.row_seconds = min(self.row_seconds, (now(self.device) - start) / rows)
            hidden.update(timeline.hidden)
            return timeline.trace()

        with self._untouched():
            return few_looks(look, sizes), hidden

    def measure(self, rows: Sequence[int], row: int) -> Passes | None:
        """Return what small real passes took, with everything that kernels take for themselves.

        Args:
            rows: One or two numbers of rows.
            row: Which row of the sample.

        Returns:
            None where nobody can tell: another profile is under way, or the device does not count.
        """
        batch = self.sample.repeat(row, 2 * max(rows))

        def run(each: int, between: Callable[[], None]) -> None:
            start = now(self.device)
            self._passes(self._micro_batches(batch, each)[:2], self.setup.parameters, None, between)
            self.row_seconds = min(self.row_seconds, (now(self.device) - start) / (2 * each))

        with self._untouched():
            traces = memory.trace_peaks(self.device, [partial(run, each) for each in rows])
        if traces is None:
            return None
        return Passes.of({(each, 0): trace for each, trace in zip(rows, traces, strict=True)})

    def measure_one(self, row: int) -> Passes | None:
        """The same of a single row, where two are too much: what one takes is counted twice for two."""
        found = self.measure((1,), row)
        if found is None:
            return None
        one = found.traces[1, 0]
        return Passes.of({(1, 0): one, (2, 0): one.doubled()})

    def seconds(self, rows: int, row: int = 0, *, times: int = 1) -> float:
        """Return the time of a forward and a backward pass, the shortest of some. Unit: seconds."""
        best = float("inf")
        with self._untouched():
            batch = self.sample.repeat(row, rows)
            sums = self._sums(self.setup.parameters, self.setup.bystanders)
            sums.start()
            try:
                for _ in range(times):
                    memory.synchronize(self.device)
                    start = now(self.device)
                    (micro_batch,) = self._micro_batches(batch, rows)
                    sums.open_backward()
                    torch.autograd.backward(self._loss(micro_batch()))
                    sums.close_backward()
                    memory.synchronize(self.device)
                    best = min(best, now(self.device) - start)
            finally:
                sums.roll_back()
        return best

    def watch(self, rows: int, row: int, ledger: Ledger) -> float:
        """Let a ledger look at a forward pass, and return how long that takes for each row. Unit: seconds.

        Nothing that is saved for a backward pass is kept meanwhile.
        """
        with self._untouched():
            (micro_batch,) = self._micro_batches(self.sample.repeat(row, rows), rows)
            with ledger.watching():
                self._loss(micro_batch())  # the first pass of all compiles and allocates
            ledger.clear()
            with ledger.watching():
                start = now(self.device)
                self._loss(micro_batch())
                memory.synchronize(self.device)
                return (now(self.device) - start) / rows

    def _fake_traces(self, fakes: Fakes, sizes: Sequence[Size], rows_of: Mapping[int, int]) -> dict[Size, Trace]:
        def look(size: Size) -> Trace:
            rows, length = size
            batch = self.sample.repeat(rows_of[length], 2 * rows)
            timeline = Timeline(self.device)
            timeline.ignore(list(_tensors_of(self.setup.model)))
            with fakes.mode:
                parameters = [fakes.of(each) for each in self.setup.parameters]
                micro_batches = self._fake_micro_batches(fakes, batch, rows)
                with timeline:
                    self._passes(micro_batches, parameters, timeline)
            return timeline.trace()

        with self._untouched():
            self._fill_caches(sizes, rows_of)
            with fakes.within(self.setup.model):
                return few_looks(look, sizes)

    def _fill_caches(self, sizes: Sequence[Size], rows_of: Mapping[int, int]) -> None:
        """Run forward passes for real, as far as the device has room for them.

        What a model keeps for later passes in a place of its own, such as a mask for each length, would be a stand-in
        for ever if it were made on fake tensors.
        """
        room = available_bytes(self.device)
        for rows, length in sizes:
            timeline = Timeline(self.device, room)
            timeline.ignore(list(_tensors_of(self.setup.model)))
            batch = self.sample.repeat(rows_of[length], rows)
            with suppress(Exception), torch.no_grad(), timeline:  # fake tensors will show what is wrong
                self._result(*[make() for make in self._micro_batches(batch, rows)])

    def _passes(
        self,
        micro_batches: Sequence[Callable[[], Any]],
        parameters: Sequence[Any],
        timeline: Timeline | None,
        between: Callable[[], None] | None = None,
    ) -> None:
        """Two micro-batches of a window, which is then rolled back."""
        held = set(map(id, parameters))
        bystanders = [each for each in self.setup.model.parameters() if id(each) not in held]
        sums = self._sums(parameters, bystanders)
        sums.start()
        arriving = ExitStack()
        if timeline is not None and not sums.narrow:
            for each in (*parameters, *bystanders):
                if each.requires_grad:
                    arriving.callback(each.register_post_accumulate_grad_hook(timeline.arrived).remove)
        try:
            for place, make in enumerate(micro_batches):
                if place:
                    if timeline is not None and timeline.repeat():
                        break
                    if timeline is not None:
                        timeline.begin_second()
                    if between is not None:
                        between()
                micro_batch = make()
                if timeline is not None:
                    timeline.note(micro_batch, "data")
                loss = self._loss(micro_batch)
                del micro_batch
                if timeline is not None:
                    timeline.mark_kept()
                sums.open_backward()
                torch.autograd.backward(loss)
                sums.close_backward()
                del loss
                if timeline is not None:
                    timeline.mark([each.grad for each in (*parameters, *bystanders)], "gradients")
                    timeline.mark(sums.own_tensors(), "running sum")
        finally:
            arriving.close()
            sums.roll_back()

    def _sums(self, parameters: Sequence[Any], bystanders: Sequence[Any]) -> GradientSum:
        """Sum gradients as a window does, and let go of those that an optimizer takes in.

        Args:
            parameters: Those of the setup, or what stands in for them, in the same order.
            bystanders: As for `GradientSum`.
        """
        consumed = consumed_by(self.setup.optimizers)
        taken = [each for each, real in zip(parameters, self.setup.parameters, strict=True) if real in consumed]
        return GradientSum(parameters, bystanders, self.sum_in, forgetting(taken) if taken else None)

    def _loss(self, micro_batch: Any) -> Tensor:
        result = self._result(micro_batch)
        if isinstance(result, tuple):
            loss, once = result[0], result[2] if len(result) == 3 else None
            loss = loss + once if isinstance(once, Tensor) and once.requires_grad else loss
        else:
            loss = result
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise LossError(
                "The loss function returned nothing that a backward pass can start from.",
                hint="return a tensor with one number and a graph, or (loss_sum, targets).",
            )
        return loss.reshape(())

    def _result(self, micro_batch: Any) -> Any:
        assert self.objective.loss_fn is not None
        with self.precision.autocast():
            return self.objective.loss_fn(self.setup.model, micro_batch)

    def _micro_batches(self, batch: LogicalBatch, rows: int) -> list[Callable[[], Any]]:
        def make(start: int) -> Callable[[], Any]:
            places: Sequence[int] = range(start, start + rows)
            return lambda: move(batch.take(list(places) if self.sample.copied else places), self.device)

        return [make(start) for start in range(0, batch.rows, rows)]

    def _fake_micro_batches(self, fakes: Fakes, batch: LogicalBatch, rows: int) -> list[Callable[[], Any]]:
        """The same on fake tensors. Collating is left out of it: it may look at numbers."""

        def fake(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            copy = fakes.mode.from_tensor(leaf, static_shapes=True)
            return copy if copy.device == self.device else copy.to(self.device)

        if self.sample.collate is not None or self.sample.copied or self.device.type != "cpu":
            made = [batch.take(range(start, start + rows)) for start in range(0, batch.rows, rows)]
            return [lambda each=each: map_leaves(fake, each) for each in made]  # type: ignore[misc]
        whole = map_leaves(fake, batch.take(range(batch.rows)))
        cut = LogicalBatch(whole, whole=self.sample.whole, dims=self.sample.dims)
        return [lambda start=start: cut.take(range(start, start + rows)) for start in range(0, batch.rows, rows)]  # type: ignore[misc]

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Put everything back at the end that a pass may change: buffers, random streams, gradients, modes."""
        parameters = list(self.setup.model.parameters())
        gradients = [each.grad for each in parameters]
        transaction = Transaction(self.setup.model, self.device)
        transaction.begin()
        collecting = gc.isenabled()
        gc.disable()  # a collection in the middle would move a release to another moment
        try:
            yield
        finally:
            if collecting:
                gc.enable()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            transaction.roll_back()


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
