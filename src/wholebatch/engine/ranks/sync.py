"""When do several ranks speak? Once a window, at its end.

Each rank runs micro-batches of its own, as many as it has. They speak at the end of the window:
the gradients are added up, and one message of 64 bytes says what they are the gradients of. A rank that fails takes
part in both all the same, so that nobody waits for it, and says so in its message; then no rank moves, and only then
are the reasons exchanged.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wholebatch.core.errors import RankError
from wholebatch.core.split import Indices, Size
from wholebatch.core.weights import Count, common_factor, gradient_factor
from wholebatch.core.window import WindowState
from wholebatch.engine.meetings.company import Again
from wholebatch.engine.meetings.far import FAILED, Far
from wholebatch.engine.meetings.reach import Reach
from wholebatch.engine.ranks.message import (
    Heard,
    anywhere,
    common_of,
    no_gradient,
    say_failed,
    words,
)
from wholebatch.engine.ranks.outcomes import Outcome, Outcomes
from wholebatch.engine.ranks.reduction import Reduction
from wholebatch.engine.ranks.sharding import Sharding, sharded_modules
from wholebatch.engine.ranks.streams import Streams
from wholebatch.engine.ranks.wire import Wire
from wholebatch.engine.ranks.wrapping import Wrapping, sparse_parameters
from wholebatch.engine.sums import GradientSum
from wholebatch.engine.weighing import Reading, Weighing


class Many:
    """A group of several ranks.

    Args:
        model: As it was given to the accumulator.
        wire: Speaks to the others.
        introduce: Makes all ranks equal, with all of them, before the first window.
        dtype: In which gradients travel; None: as the sums are, in 32 bits at least.
        measures: Whether the gradient noise scale is measured.
    """

    def __init__(
        self,
        model: nn.Module,
        wire: Wire,
        introduce: Callable[[], None],
        dtype: torch.dtype | None,
        *,
        measures: bool = False,
    ) -> None:
        self.ranks = wire.ranks
        self.in_step, self.in_pass, self.rehearses, self.passes, self.spare = False, False, False, 0, None
        self.reference: float | None = None
        self.streams = Streams(several=True)
        self.wire = wire
        sharded = sharded_modules(model)
        self._wrapping = Sharding(model, sharded) if sharded else Wrapping(model)
        self._sparse = sparse_parameters(model)
        self._introduce: Callable[[], None] | None = introduce
        self._dtype = dtype
        self._measures = measures
        self._reduction: Reduction | None = None
        self._overlap = True
        self._common = 1.0
        self._supervised = self._apart = False
        self._meets = False
        self._reach: Far | None = None
        self._owed = False  # whether the others wait for this rank's part of a window
        self._outcomes = Outcomes(wire)

    @property
    def has_met(self) -> bool:
        """Whether one of them has found out that micro-batches meet."""
        return self._outcomes.meet

    def state_dict(self) -> dict[str, Any]:
        """Return what another process of this rank has to know of the windows until now."""
        return {"common": self._common}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._common = state["common"]

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """The context in which weights are where they are between windows, also inside of one."""
        if self._owed:
            self._wrapping.release()
        try:
            yield
        finally:
            if self._owed:
                with self.wire.watching():
                    self._wrapping.hush()

    @contextmanager
    def together(self, sums: Callable[[], GradientSum]) -> Iterator[None]:
        """The context of a logical batch: an exception in it is told to the other ranks."""
        self.open(sums)
        self._supervised, self._meets = True, False
        try:
            yield
        except Exception as error:
            if self.wire.is_down(error):
                raise self.wire.unanswered(error) from error
            self._tell(error)
            raise
        except BaseException as stop:  # such as Ctrl-C, which waits for nobody
            if self._owed:
                self.wire.lost = f"it was stopped inside a window ({words(stop)})."
            raise
        finally:
            self._supervised = False
            self._wrapping.release()

    def open(self, sums: Callable[[], GradientSum]) -> None:
        """Begin a window: from now on the others wait for this rank's part."""
        self.wire.require()
        if self._introduce is not None:
            self._introduce()
            self._introduce = None
        with self.wire.watching():
            self._wrapping.hush()
        self._reach = None
        summed = sums()
        if self._reduction is None or not self._reduction.fits(summed):
            self._reduction = Reduction(summed, self._sparse, self._dtype, self.wire)
        self._owe()

    def end(self) -> None:
        """End a window, whatever has become of it."""
        self._started.stop_listening()
        if not self._supervised:
            self._wrapping.release()

    def expect_last(self, weighing: Weighing) -> None:
        """Say that the next backward pass of this rank is its last in the window."""
        if self._overlap:
            self._started.listen(lambda: common_factor(weighing.reference, self._common))

    def keep_from_sending(self) -> bool:
        """Send nothing before the close of the window, and return whether nothing has been sent."""
        self._started.stop_listening()
        return not self._started.begun

    def agree_on_passes(self, passes: int, spare: Any, *, learns: bool) -> None:
        """Let each rank make as many passes as it has micro-batches."""

    def rehearsing(self) -> AbstractContextManager[object]:
        raise AssertionError

    def settle(self, sums: GradientSum, weighing: Weighing, state: WindowState) -> Reading:
        """Return what the window came to, over all ranks, and let `sums` hold the sum over all of them."""
        reduction, common = self._started, self._common
        assert reduction.sums is sums
        factor = common_factor(weighing.reference, common)
        reduction.finish(factor)
        heard = self._exchange(weighing, state, factor)
        while heard.extra and not heard.failed:
            self._overlap = False  # such gradients come again
            reduction.repeat(factor)
            heard = self._exchange(weighing, state, factor)
        self._owed = False
        self.streams.hear(heard)
        if heard.failed:
            return self._hear_why(weighing, state)
        presence = reduction.presence()
        if heard.differ:
            presence = anywhere(self.wire, presence, reduction.device)
        if heard.targets and not any(presence):
            raise no_gradient()
        with self.moving():
            reduction.put(presence)
        self._common = common_of(heard.targets, common)
        state.rows = heard.rows
        norm = math.hypot(*heard.beside)
        some = heard.targets != 0
        gradient = gradient_factor(common, heard.targets) / heard.scale if some else 0.0
        return Reading(
            loss=heard.loss_sum / heard.targets if some else math.nan,
            norm=norm * gradient,
            factor=gradient,
            scaled_norm=norm,
            targets=heard.targets,
            least=0.0,
            spread=heard.spread,
            parts=heard.parts,
        )

    def leaves(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return the parameters whose gradients arrive in a backward pass, for those that an optimizer steps."""
        return self._wrapping.leaves(parameters)

    def deliver(self, sums: GradientSum, factor: float) -> None:
        """Put the sum times `factor` where the optimizer looks for it."""
        self._wrapping.deliver(sums, factor)

    def moving(self) -> AbstractContextManager[object]:
        """The context in which all ranks have agreed to move."""
        return self._outcomes.moving()

    def withdraw(self, why: BaseException | None) -> None:
        """Tell the others that this rank's window was rolled back."""
        if self._supervised or not self._owed:
            return
        if self._apart:
            self._owed = False
            self.wire.lost = f"it left a window in the middle ({'rolled back' if why is None else words(why)})."
        elif why is None:
            self._owed = False
            self._join(Outcome("failed", "it rolled its window back"))
        elif isinstance(why, Exception):
            self._tell(why)
        else:  # such as Ctrl-C, which waits for nobody
            self.wire.lost = f"it was stopped inside a window ({words(why)})."

    @contextmanager
    def apart(self) -> Iterator[None]:
        """The context of what is done while others may be speaking of something else, so that no failure is told."""
        self._apart = True
        try:
            yield
        finally:
            self._apart = False

    def report_shortage(self, said: str, finer: Size) -> list[Size]:
        """Tell the others that memory ran out, and return to which sizes ranks have to go."""
        outcomes = self._join(Outcome("short", said, finer))
        self._outcomes.judge(outcomes)
        return self.take_shortages()

    def expect_meeting(self, meets: bool) -> None:
        """Say whether the micro-batches of the next window meet, as all ranks know."""
        self._meets = meets

    def reach(
        self,
        cut: Sequence[Indices] | None,
        micro_batches: int,
        model: nn.Module,
        device: torch.device,
        reference: Callable[[], Count],
    ) -> Reach:
        """Return those that meet in a window: the micro-batches of all ranks."""
        self._reach = Far(self.wire, cut, micro_batches, model, device, reference)
        return self._reach

    def report_meeting(self, why: str) -> None:
        """Tell the others that micro-batches meet, where nobody knew, so that all make the window again."""
        self._outcomes.judge(self._join(Outcome("meets", why)))
        self._meets = True

    def give_up(self) -> None:
        """Take part in the end of a window in which another rank has failed."""
        self._outcomes.judge(self._join(Outcome()), always=True)

    def take_shortages(self) -> list[Size]:
        """Return to which sizes ranks had to go, when that alone has undone the last window."""
        shortages = self._outcomes.take_shortages()
        if shortages:
            self._owe()
        return shortages

    @property
    def _started(self) -> Reduction:
        assert self._reduction is not None
        return self._reduction

    def _owe(self) -> None:
        self._started.start()
        self._outcomes.take_shortages()
        self._owed = True

    def _exchange(self, weighing: Weighing, state: WindowState, factor: Count) -> Heard:
        """Send the message of a window behind its gradient, and hear what all ranks have sent.

        The message does not wait for the gradient, so that it costs no latency of its own.
        """
        reduction = self._started

        def norms() -> list[Tensor]:
            reduction.wait()
            return reduction.norms()

        return Heard.of(
            self.wire,
            weighing,
            state,
            reduction.presence(),
            self.streams.ending,
            extra=float(reduction.late),
            device=reduction.device,
            beside=norms,
            # Of the gradient as it travels: a power of the factor for each of the two in a square.
            noise=(weighing.spread * factor**2, weighing.parts) if self._measures else (),
        )

    def _hear_why(self, weighing: Weighing, state: WindowState) -> Reading:
        self._started.start()  # which frees what was reduced
        try:
            return self._outcomes.hear_why(weighing, state)
        except Again:
            self._meets = True
            raise

    def _tell(self, error: Exception) -> None:
        """Tell the others why this rank has failed."""
        if not self._owed:
            return
        self._owed = False
        try:
            self._join(Outcome("failed", words(error)))
        except RankError as lost:
            error.add_note(f"The other ranks could not be told: {lost.found}")

    def _join(self, outcome: Outcome) -> list[Outcome]:
        """Take part in what is left of a window, without a gradient, and exchange what has become of it."""
        self._owed = False
        reach, self._reach = self._reach, None  # the next attempt has one of its own, once it comes that far
        if reach is not None:
            reach.say_failed()
        elif self._meets:
            self.wire.gather(FAILED)
        self._started.abandon()
        say_failed(self.wire, self._started.device, measures=self._measures)
        return self._outcomes.exchange(outcome)
